// Tiles of the contrastive block's logits: what they are made of, where they lie, and what becomes of one.
#pragma once

#include <ATen/Parallel.h>

#include <array>
#include <cmath>
#include <limits>
#include <optional>

#include "pairs.h"
#include "products.h"
#include "simd.h"

namespace fastclip {
namespace {

constexpr int64_t kRows = 128, kCols = 1024;  // a tile: 0.5 MB of fp32 logits
constexpr int64_t kFewRows = 32, kFew = 1024;  // of a tile where there are at most kFew rows, so that every thread has some
constexpr int64_t kGroup = 1024;              // rows whose dz one product sums into the text gradient
constexpr int64_t kPad = 16;                  // floats behind a tile's rows, so that they fall on different cache sets
constexpr int64_t kDepth = 32;                // D is padded to a multiple of it
constexpr float kNone = -std::numeric_limits<float>::infinity();

// What is no negative: the positive of each row, in column labels[i] or, without labels, offset + i; and where there are groups,
// the columns of the row's group.
struct Pairing {
  int64_t offset;
  const int64_t *labels, *row_groups, *col_groups;  // null where not given

  Pairing from(int64_t row, int64_t col) const {
    const auto behind = [](const int64_t* p, int64_t count) { return p ? p + count : p; };
    return {labels ? -col : offset + row - col, behind(labels, row), behind(row_groups, row), behind(col_groups, col)};
  }
  int64_t positive(int64_t i) const { return labels ? labels[i] + offset : offset + i; }
};

// A tile of logits (rows, cols), row stride `ld`, `cols` padded to a multiple of 16, and the pairing from its first entry on.
// A finished one is scaled and has -inf where no negative is; others are bare products.
struct Tile {
  float* z;
  int64_t ld, rows, cols, padded;
  Pairing pairing;
  bool is_finished;
};

FASTCLIP_INLINE float anchor(float highest) { return highest == kNone ? 0.f : highest; }
FASTCLIP_INLINE Vec anchor(Vec highest) { return highest == kNone ? Vec{} : highest; }

// Scales a row in place and puts -inf behind its end and where no negative is. Writes its positive where that lies in the tile.
FASTCLIP_INLINE void scale_row(const Tile& t, int64_t i, float scale, float* positive) {
  float* z = t.z + i * t.ld;
  for (int64_t j = 0; j < t.padded; j += kLanes) store(z + j, load(z + j) * scale);
  for (int64_t j = t.cols; j < t.padded; ++j) z[j] = kNone;
  const int64_t own = t.pairing.positive(i);
  if (own >= 0 && own < t.cols) {
    if (positive) *positive = z[own];
    z[own] = kNone;
  }
  if (t.pairing.row_groups) {
    const int64_t group = t.pairing.row_groups[i];
    for (int64_t j = 0; j < t.cols; ++j) z[j] = t.pairing.col_groups[j] == group ? kNone : z[j];
  }
}

struct Lse {
  const float *row, *col, *d_row, *d_col;
};

FASTCLIP_INLINE Vec d_logit(Vec z, float row, float d_row, const float* col, const float* d_col) {
  return d_row * exponential(z - row) + load(d_col) * exponential(z - load(col));
}

// Logits to dz_ij = d_row_i exp(z_ij - row_i) + d_col_j exp(z_ij - col_j), zero where no negative is: row by row (`out`, row
// stride ld_out; the logits' own place will do) and blocked, the columns of 64 being `stride` apart.
FASTCLIP_MULTIVERSION void differentiate(Tile t, float scale, Lse lse, float* out, int64_t ld_out, float* blocked, int64_t stride) {
  for (int64_t i = 0; i < t.rows; ++i) {
    const float* z = t.z + i * t.ld;
    if (!t.is_finished) scale_row(t, i, scale, nullptr);
    for (int64_t j = 0; j < t.padded; j += kLanes) {
      const Vec d = d_logit(load(z + j), lse.row[i], lse.d_row[i], lse.col + j, lse.d_col + j);
      store(out + i * ld_out + j, d);
      store(blocked + j / kBlock * stride + i * kBlock + j % kBlock, d);
    }
  }
}

// Sums of dz before and after it was rounded to bfloat16, of each row and of each column of a tile. Where one entry outweighs the
// others, or all are alike, the rounding is one factor for all of the row's gradient, and their ratio takes it out again.
struct Rounding {
  float *row, *row_rounded, *col, *col_rounded;
};

// The same in bfloat16, the blocked ones with pairs of rows interleaved. Adds to the rows' sums and sets the columns'.
FASTCLIP_MULTIVERSION void differentiate(Tile t, float scale, Lse lse, c10::BFloat16* out, int64_t ld_out, c10::BFloat16* blocked,
                                         int64_t stride, Rounding sums) {
  std::fill(sums.col, sums.col + t.padded, 0.f);
  std::fill(sums.col_rounded, sums.col_rounded + t.padded, 0.f);
  for (int64_t i = 0; i < t.rows; i += 2) {
    const bool has_second = i + 1 < t.rows;
    const float *z = t.z + i * t.ld, *z2 = z + t.ld;
    if (!t.is_finished) scale_row(t, i, scale, nullptr);
    if (!t.is_finished && has_second) scale_row(t, i + 1, scale, nullptr);
    Vec row = {}, row2 = {}, near_row = {}, near_row2 = {};
    for (int64_t j = 0; j < t.padded; j += kLanes) {
      const Vec d = d_logit(load(z + j), lse.row[i], lse.d_row[i], lse.col + j, lse.d_col + j), near = rounded(d);
      Vec d2 = {}, near2 = {};
      store_rounded(out + i * ld_out + j, near);
      if (has_second) {
        d2 = d_logit(load(z2 + j), lse.row[i + 1], lse.d_row[i + 1], lse.col + j, lse.d_col + j);
        near2 = rounded(d2);
        store_rounded(out + (i + 1) * ld_out + j, near2);
      }
      store_rounded_pairs(blocked + j / kBlock * stride + i * kBlock + 2 * (j % kBlock), near, near2);
      row += d, row2 += d2, near_row += near, near_row2 += near2;
      store(sums.col + j, load(sums.col + j) + (d + d2));
      store(sums.col_rounded + j, load(sums.col_rounded + j) + (near + near2));
    }
    sums.row[i] += sum(row), sums.row_rounded[i] += sum(near_row);
    if (has_second) sums.row[i + 1] += sum(row2), sums.row_rounded[i + 1] += sum(near_row2);
  }
}

// image (n, D) and text (m, D) as T, D padded with zeros, one block of columns of text in the layouts that products read, and
// the finished logits of the first rows that are kept from forward to backward (rows, m padded to a multiple of 64).
template <typename T>
struct Problem {
  at::Tensor image, text, transposed, blocked, kept;
  float scale;
  int64_t n, m, depth, kept_rows;
  Pairing pairing;

  Problem(const at::Tensor& image_features, const at::Tensor& text_features, const at::Tensor& logit_scale,
          const std::optional<at::Tensor>& kept, Pairing pairing)
      : image(padded(image_features)),
        text(padded(text_features)),
        kept(kept.value_or(at::Tensor())),
        scale(*logit_scale.const_data_ptr<float>()),
        n(image.size(0)),
        m(text.size(0)),
        depth(image.size(1)),
        kept_rows(kept ? kept->size(0) : 0),
        pairing(pairing) {}

  static at::Tensor padded(const at::Tensor& x) {
    const auto wide = x.to(c10::CppTypeToScalarType<T>::value);
    const int64_t missing = ceil_to(x.size(1), kDepth) - x.size(1);
    return (missing ? zero_padded(wide, missing) : wide).contiguous();
  }

  int64_t cols_of(int64_t col) const { return std::min(kCols, m - col); }
  int64_t padded_cols(int64_t col) const { return ceil_to(cols_of(col), kLanes); }
  int64_t tile_cols() const { return ceil_to(std::min(kCols, m), kBlock); }
  int64_t grain(int64_t tasks, int64_t least) const { return is_tiny(n, m, depth) ? tasks : least; }
  int64_t tile_rows() const { return n <= kFew ? kFewRows : kRows; }
  int64_t group_rows() const { return std::min(kGroup, ceil_to(n, tile_rows())); }
  std::array<int64_t, 2> blocks() const { return {(n + tile_rows() - 1) / tile_rows(), (m + kBlock - 1) / kBlock}; }
  bool is_kept(int64_t row) const { return std::min(row + tile_rows(), n) <= kept_rows; }

  // Lays out columns [col, col + kCols) of text, transposed for the logits.
  void take_transposed(int64_t col) {
    const int64_t cols = cols_of(col), blocks = (cols + kBlock - 1) / kBlock, words = depth / kInterleaved<T>;
    if (!transposed.defined()) transposed = text.new_empty({tile_cols(), depth});
    const T* rows = text.const_data_ptr<T>() + col * depth;
    auto* out = reinterpret_cast<float*>(transposed.mutable_data_ptr<T>());
    at::parallel_for(0, blocks, grain(blocks, 1), [&](int64_t begin, int64_t end) {
      for (int64_t j = begin * kBlock; j < end * kBlock; j += kBlock)
        block_transposed(out + j * words, reinterpret_cast<const float*>(rows + j * depth), std::min(kBlock, cols - j), words);
    });
  }

  // Lays them out as they are, for d_image.
  void take_rows(int64_t col) {
    const int64_t cols = cols_of(col), width = padded_cols(col);
    if (!blocked.defined()) blocked = text.new_empty({ceil_to(depth, kBlock), tile_cols()});
    const T* rows = text.const_data_ptr<T>() + col * depth;
    T* as_is = blocked.mutable_data_ptr<T>();
    at::parallel_for(0, ceil_to(depth, kBlock) / kBlock, grain(depth, 1), [&](int64_t begin, int64_t end) {
      for (int64_t d = begin * kBlock; d < std::min(end * kBlock, depth); d += kBlock)
        block_rows(as_is + d * width, rows + d, depth, cols, std::min(kBlock, depth - d), width);
    });
  }

  // Where the logits of rows [row, row + tile_rows()) and columns [col, col + kCols) are kept, or else in `scratch`.
  Tile place(float* scratch, int64_t row, int64_t col) const {
    const int64_t rows = std::min(tile_rows(), n - row), cols = cols_of(col), width = padded_cols(col);
    if (!is_kept(row)) return {scratch, tile_cols() + kPad, rows, cols, width, pairing.from(row, col), false};
    float* z = kept.mutable_data_ptr<float>() + row * kept.stride(0) + col;
    return {z, kept.stride(0), rows, cols, width, pairing.from(row, col), true};
  }

  // Fills a tile with the bare products of its rows and the columns transposed last, or its kBlock columns from j on.
  void multiply(Tile& t, int64_t row) const {
    for (int64_t j = 0; j < t.padded; j += kBlock) multiply_block(t, row, j);
    t.is_finished = false;
  }
  void multiply_block(const Tile& t, int64_t row, int64_t j) const {
    const T *left = image.const_data_ptr<T>() + row * depth, *right = transposed.const_data_ptr<T>();
    product(t.rows, std::min(kBlock, t.padded - j), depth, left, depth, right + j * depth, t.z + j, t.ld, false);
  }

  // Scratch of `floats` elements for each thread, and this thread's part of it.
  at::Tensor scratch(int64_t elements, at::ScalarType type) const {
    return image.new_empty({at::get_num_threads(), elements}, type);
  }
};

template <typename U>
U* mine(at::Tensor& scratch) {
  return scratch.mutable_data_ptr<U>() + at::get_thread_num() * scratch.size(1);
}

}  // namespace
}  // namespace fastclip
