// The contrastive block on the CPU: statistics of the negatives of every row and column, and their gradient.
//
// Logits live in tiles of 128 rows and up to 1024 columns, made by the library's micro-kernels (products.h) and used up in the
// second-level cache by vectorised passes over their rows and columns. bfloat16 features are multiplied as they are, with fp32
// logits and bfloat16 dz, where the processor has 16-bit products, and widened where it has none. Tiles are cut the same way and
// summed in the same order whatever the number of threads, so the result does not depend on it. See
// ops/contrastive_loss/reference.py for the maths.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>

#include "products.h"
#include "simd.h"

namespace fastclip {
namespace {

constexpr int64_t kRows = 128, kCols = 1024;  // a tile: 0.5 MB of fp32 logits
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

// A tile of logits (rows, cols), row stride `ld`, `cols` padded to a multiple of 64, and the pairing from its first entry on.
struct Tile {
  float* z;
  int64_t ld, rows, cols, padded;
  Pairing pairing;
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

// Scales a tile, takes out the positives, and folds each row into its running (max, sum of exp(z - max)).
FASTCLIP_MULTIVERSION void fold_rows(Tile t, float scale, float* positive, float* highest, float* sums) {
  for (int64_t i = 0; i < t.rows; ++i) {
    const float* z = t.z + i * t.ld;
    scale_row(t, i, scale, positive + i);
    Vec top = splat(highest[i]);
    for (int64_t j = 0; j < t.padded; j += kLanes) top = maximum(load(z + j), top);
    const float next = maximum(top), base = anchor(next);
    Vec total = {};
    for (int64_t j = 0; j < t.padded; j += kLanes) total += exponential(load(z + j) - base);
    sums[i] = sums[i] * std::exp(highest[i] - base) + sum(total);
    highest[i] = next;
  }
}

// (max, sum of exp(z - max)) of each column of a tile, after `fold_rows`.
FASTCLIP_MULTIVERSION void fold_cols(Tile t, float* highest, float* sums) {
  for (int64_t j = 0; j < t.padded; j += kLanes) {
    Vec top = splat(kNone);
    for (int64_t i = 0; i < t.rows; ++i) top = maximum(load(t.z + i * t.ld + j), top);
    const Vec base = anchor(top);
    Vec total = {};
    for (int64_t i = 0; i < t.rows; ++i) total += exponential(load(t.z + i * t.ld + j) - base);
    store(highest + j, top);
    store(sums + j, total);
  }
}

// (max, sum) of 16 columns over `tiles` tiles, `stride` floats apart.
FASTCLIP_MULTIVERSION void merge_cols(const float* highest, const float* sums, int64_t tiles, int64_t stride, float* out_max, float* out_sum) {
  Vec top = splat(kNone);
  for (int64_t k = 0; k < tiles; ++k) top = maximum(load(highest + k * stride), top);
  const Vec base = anchor(top);
  Vec total = {};
  for (int64_t k = 0; k < tiles; ++k) total += load(sums + k * stride) * exponential(load(highest + k * stride) - base);
  store(out_max, top);
  store(out_sum, total);
}

struct Lse {
  const float *row, *col, *d_row, *d_col;
};

FASTCLIP_INLINE Vec d_logit(Vec z, float row, float d_row, const float* col, const float* d_col) {
  return d_row * exponential(z - row) + load(d_col) * exponential(z - load(col));
}

// Logits to dz_ij = d_row_i exp(z_ij - row_i) + d_col_j exp(z_ij - col_j), zero at the positives: in place and blocked, the
// columns of 64 being `stride` apart.
FASTCLIP_MULTIVERSION void differentiate(Tile t, float scale, Lse lse, float* blocked, int64_t stride) {
  for (int64_t i = 0; i < t.rows; ++i) {
    float* z = t.z + i * t.ld;
    scale_row(t, i, scale, nullptr);
    for (int64_t j = 0; j < t.padded; j += kLanes) {
      const Vec d = d_logit(load(z + j), lse.row[i], lse.d_row[i], lse.col + j, lse.d_col + j);
      store(z + j, d);
      store(blocked + j / kBlock * stride + i * kBlock + j % kBlock, d);
    }
  }
}

// The same in bfloat16, row by row (`out`, row stride ld_out) and blocked with pairs of rows interleaved.
FASTCLIP_MULTIVERSION void differentiate(Tile t, float scale, Lse lse, c10::BFloat16* out, int64_t ld_out, c10::BFloat16* blocked,
                                         int64_t stride) {
  for (int64_t i = 0; i < t.rows; i += 2) {
    const bool has_second = i + 1 < t.rows;
    const float *z = t.z + i * t.ld, *z2 = z + t.ld;
    scale_row(t, i, scale, nullptr);
    if (has_second) scale_row(t, i + 1, scale, nullptr);
    for (int64_t j = 0; j < t.padded; j += kLanes) {
      const Vec d = d_logit(load(z + j), lse.row[i], lse.d_row[i], lse.col + j, lse.d_col + j);
      Vec d2 = {};
      store(out + i * ld_out + j, d);
      if (has_second) {
        d2 = d_logit(load(z2 + j), lse.row[i + 1], lse.d_row[i + 1], lse.col + j, lse.d_col + j);
        store(out + (i + 1) * ld_out + j, d2);
      }
      store_pairs(blocked + j / kBlock * stride + i * kBlock + 2 * (j % kBlock), d, d2);
    }
  }
}

// image (n, D) and text (m, D) as T, D padded with zeros, and one block of columns of text in the layouts that products read.
template <typename T>
struct Problem {
  at::Tensor image, text, transposed, blocked;
  float scale;
  int64_t n, m, depth;
  Pairing pairing;

  Problem(const at::Tensor& image_features, const at::Tensor& text_features, const at::Tensor& logit_scale, Pairing pairing)
      : image(padded(image_features)),
        text(padded(text_features)),
        scale(*logit_scale.const_data_ptr<float>()),
        n(image.size(0)),
        m(text.size(0)),
        depth(image.size(1)),
        pairing(pairing) {}

  static at::Tensor padded(const at::Tensor& x) {
    const auto wide = x.to(c10::CppTypeToScalarType<T>::value);
    const int64_t missing = ceil_to(x.size(1), kDepth) - x.size(1);
    return (missing ? at::constant_pad_nd(wide, {0, missing}) : wide).contiguous();
  }

  int64_t cols_of(int64_t col) const { return std::min(kCols, m - col); }
  int64_t tile_cols() const { return ceil_to(std::min(kCols, m), kBlock); }

  // Lays out columns [col, col + kCols) of text: transposed for the logits and, where asked for, as it is for d_image.
  void take_cols(int64_t col, bool with_rows) {
    const int64_t cols = cols_of(col), width = ceil_to(cols, kBlock), words = depth / kInterleaved<T>;
    if (!transposed.defined()) transposed = at::empty({tile_cols(), depth}, text.options());
    if (with_rows && !blocked.defined()) blocked = at::empty({ceil_to(depth, kBlock), tile_cols()}, text.options());
    const T* rows = text.const_data_ptr<T>() + col * depth;
    auto* out = reinterpret_cast<uint32_t*>(transposed.mutable_data_ptr<T>());
    at::parallel_for(0, width / kBlock, 1, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin * kBlock; j < end * kBlock; j += kBlock)
        block_transposed(out + j * words, reinterpret_cast<const uint32_t*>(rows + j * depth), std::min(kBlock, cols - j), words);
    });
    if (!with_rows) return;
    T* as_is = blocked.mutable_data_ptr<T>();
    at::parallel_for(0, ceil_to(depth, kBlock) / kBlock, 1, [&](int64_t begin, int64_t end) {
      for (int64_t d = begin * kBlock; d < std::min(end * kBlock, depth); d += kBlock)
        block_rows(as_is + d * width, rows + d, depth, cols, std::min(kBlock, depth - d), width);
    });
  }

  // The tile of rows [row, row + kRows) and the columns taken last, in `z`, not yet scaled.
  Tile tile(float* z, int64_t row, int64_t col) const {
    const int64_t rows = std::min(kRows, n - row), cols = cols_of(col), width = ceil_to(cols, kBlock), ld = tile_cols() + kPad;
    const T *left = image.const_data_ptr<T>() + row * depth, *right = transposed.const_data_ptr<T>();
    for (int64_t j = 0; j < width; j += kBlock) product(rows, kBlock, depth, left, depth, right + j * depth, z + j, ld, false);
    return {z, ld, rows, cols, width, pairing.from(row, col)};
  }

  // Scratch of `floats` elements for each thread, and this thread's part of it.
  at::Tensor scratch(int64_t elements, at::ScalarType type) const {
    return at::empty({at::get_num_threads(), elements}, image.options().dtype(type));
  }
};

template <typename U>
U* mine(at::Tensor& scratch) {
  return scratch.mutable_data_ptr<U>() + at::get_thread_num() * scratch.size(1);
}

template <typename T>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> statistics(Problem<T> p) {
  const auto options = p.image.options().dtype(at::kFloat);
  auto positive = at::full({p.n}, std::numeric_limits<float>::quiet_NaN(), options);
  auto row_max = at::full({p.n}, kNone, options), row_sum = at::zeros({p.n}, options);
  const int64_t width = p.tile_cols(), tiles = (p.n + kRows - 1) / kRows;
  auto col_max = at::empty({ceil_to(p.m, kBlock)}, options), col_sum = at::empty({ceil_to(p.m, kBlock)}, options);
  auto part_max = at::empty({tiles, width}, options), part_sum = at::empty({tiles, width}, options);
  auto tile_scratch = p.scratch(kRows * (width + kPad), at::kFloat);
  auto at = [](at::Tensor& x, int64_t first) { return x.mutable_data_ptr<float>() + first; };
  for (int64_t col = 0; col < p.m; col += kCols) {
    p.take_cols(col, false);
    at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const int64_t row = k * kRows;
        const Tile t = p.tile(mine<float>(tile_scratch), row, col);
        fold_rows(t, p.scale, at(positive, row), at(row_max, row), at(row_sum, row));
        fold_cols(t, at(part_max, k * width), at(part_sum, k * width));
      }
      release<T>();
    });
    at::parallel_for(0, ceil_to(p.cols_of(col), kBlock) / kLanes, 16, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin * kLanes; j < end * kLanes; j += kLanes)
        merge_cols(at(part_max, j), at(part_sum, j), tiles, width, at(col_max, col + j), at(col_sum, col + j));
    });
  }
  return {positive, row_max, row_sum.log_(), col_max.narrow(0, 0, p.m), col_sum.narrow(0, 0, p.m).log_()};
}

template <typename T>
std::tuple<at::Tensor, at::Tensor> negative_gradients(Problem<T> p, const at::Tensor& row_lse, const at::Tensor& col_lse,
                                                      const at::Tensor& d_row_lse, const at::Tensor& d_col_lse) {
  constexpr bool kNarrow = !std::is_same_v<T, float>;
  const auto options = p.image.options().dtype(at::kFloat);
  const int64_t width = p.tile_cols(), groups = (p.n + kGroup - 1) / kGroup, group_rows = std::min(kGroup, ceil_to(p.n, kRows));
  const auto row = row_lse.contiguous(), d_row = d_row_lse.contiguous();
  const auto tail = ceil_to(p.m, kBlock) - p.m;  // a tile reads whole vectors of columns
  const auto col = at::constant_pad_nd(col_lse, {0, tail}), d_col = at::constant_pad_nd(d_col_lse, {0, tail});
  auto grad_image = at::empty({p.n, p.depth}, options), grad_text = at::zeros({ceil_to(p.m, kBlock), p.depth}, options);
  auto image_transposed = at::empty({groups, p.depth, group_rows}, p.image.options());
  auto tile_scratch = p.scratch(kRows * (width + kPad), at::kFloat);
  auto narrow_scratch = p.scratch(kNarrow ? kRows * (width + kPad) : 0, p.image.scalar_type());
  auto column_scratch = p.scratch(p.depth * kBlock, at::kFloat);
  auto d_logits = at::empty({width / kBlock, group_rows, kBlock}, p.image.options());  // of one group, blocked
  const float *row_at = row.template const_data_ptr<float>(), *d_row_at = d_row.template const_data_ptr<float>();
  const float *col_at = col.template const_data_ptr<float>(), *d_col_at = d_col.template const_data_ptr<float>();
  float *grad_image_at = grad_image.template mutable_data_ptr<float>(), *grad_text_at = grad_text.template mutable_data_ptr<float>();
  const int64_t stride = group_rows * kBlock;
  T* blocked = d_logits.template mutable_data_ptr<T>();

  at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      const int64_t count = std::min(kGroup, p.n - g * kGroup);
      transpose_rows(image_transposed.template mutable_data_ptr<T>() + g * p.depth * group_rows, group_rows,
                     p.image.template const_data_ptr<T>() + g * kGroup * p.depth, p.depth, count, p.depth, ceil_to(count, kInterleaved<T>));
    }
  });
  for (int64_t first_col = 0; first_col < p.m; first_col += kCols) {
    p.take_cols(first_col, true);
    const int64_t cols = ceil_to(p.cols_of(first_col), kBlock);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = g * kGroup, count = std::min(kGroup, p.n - first);
      at::parallel_for(0, (count + kRows - 1) / kRows, 1, [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k) {
          const int64_t i = first + k * kRows;
          const Tile t = p.tile(mine<float>(tile_scratch), i, first_col);
          const Lse lse{row_at + i, col_at + first_col, d_row_at + i, d_col_at + first_col};
          T* left;
          if constexpr (kNarrow) {
            left = mine<T>(narrow_scratch);
            differentiate(t, p.scale, lse, left, t.ld, blocked + k * kRows * kBlock, stride);
          } else {
            left = t.z;
            differentiate(t, p.scale, lse, blocked + k * kRows * kBlock, stride);
          }
          const T* right = p.blocked.template const_data_ptr<T>();
          for (int64_t d = 0; d < p.depth; d += kBlock)
            product(t.rows, std::min(kBlock, p.depth - d), cols, left, t.ld, right + d * cols, grad_image_at + i * p.depth + d, p.depth,
                    first_col > 0);
        }
        release<T>();
      });
      // d_text, transposed: (D, rows of the group) dz, 64 columns at a time.
      const T* left = image_transposed.template const_data_ptr<T>() + g * p.depth * group_rows;
      at::parallel_for(0, cols / kBlock * (p.depth / kDepth), 8, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t j = task / (p.depth / kDepth), d = task % (p.depth / kDepth) * kDepth;
          product(kDepth, kBlock, ceil_to(count, kInterleaved<T>), left + d * group_rows, group_rows, blocked + j * stride,
                  grad_text_at + (first_col + j * kBlock) * p.depth + d * kBlock, kBlock, true);
        }
        release<T>();
      });
    }
    at::parallel_for(0, cols / kBlock, 1, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {  // each block of 64 rows of d_text stands transposed in its own place
        float *block = grad_text_at + (first_col + j * kBlock) * p.depth, *copy = mine<float>(column_scratch);
        std::copy(block, block + p.depth * kBlock, copy);
        transpose_rows(block, p.depth, copy, kBlock, p.depth, kBlock, p.depth);
      }
    });
  }
  return {grad_image, grad_text.narrow(0, 0, p.m)};
}

// visit(T()) with the type that the products of such features are made in.
template <typename Visit>
auto by_type(const at::Tensor& features, const Visit& visit) {
  const bool narrow = features.scalar_type() == at::kBFloat16 && at::native::cpublas::could_pack(at::kBFloat16);
  return narrow ? visit(c10::BFloat16()) : visit(float());
}

// int64 ids (count,) or none, contiguous for as long as this lives.
struct Ids {
  at::Tensor ids;

  explicit Ids(const std::optional<at::Tensor>& given) : ids(given ? given->contiguous() : at::Tensor()) {}
  const int64_t* data() const { return ids.defined() ? ids.const_data_ptr<int64_t>() : nullptr; }
};

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> contrastive_loss_statistics(
    const at::Tensor& image_features, const at::Tensor& text_features, const at::Tensor& logit_scale, int64_t offset,
    const std::optional<at::Tensor>& labels, const std::optional<at::Tensor>& row_groups, const std::optional<at::Tensor>& col_groups) {
  const Ids own(labels), rows(row_groups), cols(col_groups);
  const Pairing pairing{offset, own.data(), rows.data(), cols.data()};
  return by_type(image_features, [&](auto type) {
    return statistics(Problem<decltype(type)>(image_features, text_features, logit_scale, pairing));
  });
}

std::tuple<at::Tensor, at::Tensor> contrastive_loss_negative_gradients(
    const at::Tensor& image_features, const at::Tensor& text_features, const at::Tensor& logit_scale, const at::Tensor& row_lse,
    const at::Tensor& col_lse, const at::Tensor& d_row_lse, const at::Tensor& d_col_lse, int64_t offset,
    const std::optional<at::Tensor>& labels, const std::optional<at::Tensor>& row_groups, const std::optional<at::Tensor>& col_groups) {
  const Ids own(labels), rows(row_groups), cols(col_groups);
  const Pairing pairing{offset, own.data(), rows.data(), cols.data()};
  const auto [grad_image, grad_text] = by_type(image_features, [&](auto type) {
    return negative_gradients(Problem<decltype(type)>(image_features, text_features, logit_scale, pairing), row_lse, col_lse, d_row_lse,
                              d_col_lse);
  });
  const int64_t depth = image_features.size(1);
  return {grad_image.narrow(1, 0, depth).contiguous(), grad_text.narrow(1, 0, depth).contiguous()};
}

}  // namespace fastclip
