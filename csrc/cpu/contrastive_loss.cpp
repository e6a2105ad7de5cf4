// The contrastive block on the CPU: statistics of the negatives of every row and column, and their gradient.
//
// Logits live in tiles of 128 rows and up to 1024 columns, made by the library's micro-kernels (products.h) and used up in the
// second-level cache by vectorised passes over their rows and columns. bfloat16 features are multiplied as they are, with fp32
// logits and bfloat16 dz, where the processor has 16-bit products, and widened where it has none. Tiles are cut the same way and
// summed in the same order whatever the number of threads, so the result does not depend on it. See
// ops/contrastive_loss/reference.py for the maths.
#include <ATen/Parallel.h>

#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

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

  // Fills a tile with the bare products of its rows and the columns transposed last.
  void multiply(Tile& t, int64_t row) const {
    const T *left = image.const_data_ptr<T>() + row * depth, *right = transposed.const_data_ptr<T>();
    for (int64_t j = 0; j < t.padded; j += kBlock)
      product(t.rows, std::min(kBlock, t.padded - j), depth, left, depth, right + j * depth, t.z + j, t.ld, false);
    t.is_finished = false;
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

template <typename T>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> statistics(Problem<T> p) {
  const auto empty = [&](at::IntArrayRef sizes) { return p.image.new_empty(sizes, at::kFloat); };
  auto positive = empty({p.n}).fill_(std::numeric_limits<float>::quiet_NaN());
  auto row_max = empty({p.n}).fill_(kNone), row_sum = empty({p.n}).zero_();
  const int64_t width = p.tile_cols(), step = p.tile_rows(), tiles = (p.n + step - 1) / step;
  auto col_max = empty({ceil_to(p.m, kBlock)}), col_sum = empty({ceil_to(p.m, kBlock)});
  auto part_max = empty({tiles, width}), part_sum = empty({tiles, width});
  auto tile_scratch = p.scratch(step * (width + kPad), at::kFloat);
  auto at = [](at::Tensor& x, int64_t first) { return x.mutable_data_ptr<float>() + first; };
  for (int64_t col = 0; col < p.m; col += kCols) {
    p.take_transposed(col);
    at::parallel_for(0, tiles, p.grain(tiles, 1), [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const int64_t row = k * step;
        Tile t = p.place(mine<float>(tile_scratch), row, col);
        p.multiply(t, row);
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

// What undoes a rounding, (2, count) sums before and after it; 1 where they cancel and say nothing.
at::Tensor correction(const at::Tensor& sums) {
  const auto ratio = sums[0].div(sums[1]);
  return ratio.masked_fill(ratio.sub(1).abs_().le(0x1p-8).logical_not_(), 1.f).unsqueeze_(1);
}

template <typename T>
std::tuple<at::Tensor, at::Tensor> negative_gradients(Problem<T> p, const at::Tensor& row_lse, const at::Tensor& col_lse,
                                                      const at::Tensor& d_row_lse, const at::Tensor& d_col_lse) {
  constexpr bool kNarrow = !std::is_same_v<T, float>;
  const auto empty = [&](at::IntArrayRef sizes) { return p.image.new_empty(sizes, at::kFloat); };
  const int64_t width = p.tile_cols(), step = p.tile_rows();
  const int64_t groups = (p.n + kGroup - 1) / kGroup, group_rows = std::min(kGroup, ceil_to(p.n, step));
  const auto row = row_lse.contiguous(), d_row = d_row_lse.contiguous();
  const auto tail = ceil_to(p.m, kBlock) - p.m;  // a tile reads whole vectors of columns
  const auto col = zero_padded(col_lse, tail), d_col = zero_padded(d_col_lse, tail);
  auto grad_image = empty({p.n, p.depth}), grad_text = empty({ceil_to(p.m, kBlock), p.depth});
  auto image_transposed = p.image.new_empty({groups, p.depth, group_rows});
  const int64_t ld = width + kPad;
  auto tile_scratch = p.scratch(step * ld, at::kFloat);
  auto narrow_scratch = p.scratch(kNarrow ? step * ld : 0, p.image.scalar_type());
  auto column_scratch = p.scratch(p.depth * kBlock, at::kFloat);
  auto d_logits = p.image.new_empty({width / kBlock, group_rows, kBlock});  // of one group, blocked
  const float *row_at = row.template const_data_ptr<float>(), *d_row_at = d_row.template const_data_ptr<float>();
  const float *col_at = col.template const_data_ptr<float>(), *d_col_at = d_col.template const_data_ptr<float>();
  float *grad_image_at = grad_image.template mutable_data_ptr<float>(), *grad_text_at = grad_text.template mutable_data_ptr<float>();
  const int64_t stride = group_rows * kBlock, group_tiles = group_rows / step;
  auto row_sums = empty({2, kNarrow ? p.n : 0}).zero_(), col_sums = empty({2, kNarrow ? ceil_to(p.m, kBlock) : 0}).zero_();
  auto tile_sums = empty({2, kNarrow ? group_tiles : 0, width});  // of columns, of the tiles of one group
  T* blocked = d_logits.template mutable_data_ptr<T>();

  at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      const int64_t count = std::min(kGroup, p.n - g * kGroup);
      transpose_rows(image_transposed.template mutable_data_ptr<T>() + g * p.depth * group_rows, group_rows,
                     p.image.template const_data_ptr<T>() + g * kGroup * p.depth, p.depth, count, p.depth, ceil_to(count, kInterleaved<T>));
    }
  });
  for (int64_t first_col = 0; first_col < p.m; first_col += kCols) {
    if (p.kept_rows < p.n) p.take_transposed(first_col);
    p.take_rows(first_col);
    const int64_t cols = p.padded_cols(first_col), blocks = (cols + kBlock - 1) / kBlock;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = g * kGroup, count = std::min(kGroup, p.n - first);
      at::parallel_for(0, (count + step - 1) / step, p.grain(count, 1), [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k) {
          const int64_t i = first + k * step;
          Tile t = p.place(mine<float>(tile_scratch), i, first_col);
          if (!t.is_finished) p.multiply(t, i);
          const Lse lse{row_at + i, col_at + first_col, d_row_at + i, d_col_at + first_col};
          T* left;
          if constexpr (kNarrow) {
            left = mine<T>(narrow_scratch);
            float *of_rows = row_sums.template mutable_data_ptr<float>() + i, *of_cols = tile_sums.template mutable_data_ptr<float>() + k * width;
            const Rounding sums{of_rows, of_rows + p.n, of_cols, of_cols + group_tiles * width};
            differentiate(t, p.scale, lse, left, ld, blocked + k * step * kBlock, stride, sums);
          } else {
            left = mine<float>(tile_scratch);
            differentiate(t, p.scale, lse, left, ld, blocked + k * step * kBlock, stride);
          }
          const T* right = p.blocked.template const_data_ptr<T>();
          for (int64_t d = 0; d < p.depth; d += kBlock)
            product(t.rows, std::min(kBlock, p.depth - d), cols, left, ld, right + d * cols, grad_image_at + i * p.depth + d, p.depth,
                    first_col > 0);
        }
        release<T>();
      });
      if constexpr (kNarrow) {
        const int64_t tiles = (count + step - 1) / step;
        col_sums.narrow(1, first_col, cols).add_(tile_sums.narrow(1, 0, tiles).narrow(2, 0, cols).sum(1));
      }
      // d_text, transposed: (D, rows of the group) dz, 64 columns at a time.
      const T* left = image_transposed.template const_data_ptr<T>() + g * p.depth * group_rows;
      at::parallel_for(0, blocks * (p.depth / kDepth), p.grain(cols * p.depth, 8), [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t j = task / (p.depth / kDepth), d = task % (p.depth / kDepth) * kDepth;
          product(kDepth, std::min(kBlock, cols - j * kBlock), ceil_to(count, kInterleaved<T>), left + d * group_rows, group_rows,
                  blocked + j * stride, grad_text_at + (first_col + j * kBlock) * p.depth + d * kBlock, kBlock, g > 0);
        }
        release<T>();
      });
    }
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {  // each block of 64 rows of d_text stands transposed in its own place
        float *block = grad_text_at + (first_col + j * kBlock) * p.depth, *copy = mine<float>(column_scratch);
        const int64_t used = std::min(kBlock, cols - j * kBlock);
        for (int64_t d = 0; d < p.depth; ++d) std::copy(block + d * kBlock, block + d * kBlock + used, copy + d * used);
        transpose_rows(block, p.depth, copy, used, p.depth, used, p.depth);
      }
    });
  }
  grad_text = grad_text.narrow(0, 0, p.m);
  if constexpr (kNarrow) {
    grad_image.mul_(correction(row_sums));
    grad_text.mul_(correction(col_sums.narrow(1, 0, p.m)));
  }
  return {grad_image, grad_text};
}

// The mean loss of n pairs and its gradients for image, text and scale, with all logits kept in between: 3 products.
template <typename T>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> mean_loss(Problem<T> p) {
  const auto empty = [&](at::IntArrayRef sizes) { return p.image.new_empty(sizes, at::kFloat); };
  p.kept = empty({p.n, ceil_to(p.m, kBlock) + kPad});
  p.kept_rows = p.n;
  const auto [positive, row_max, row_log_sum, col_max, col_log_sum] = statistics(p);
  auto lse = empty({2, p.n}), d_lse = empty({2, p.n});
  std::vector<double> d_positive(p.n);
  const float* own = positive.template const_data_ptr<float>();
  double loss = 0;
  for (int side = 0; side < 2; ++side) {
    const float *highest = (side ? col_max : row_max).template const_data_ptr<float>();
    const float *log_sum = (side ? col_log_sum : row_log_sum).template const_data_ptr<float>();
    float *lse_at = lse.template mutable_data_ptr<float>() + side * p.n, *d_at = d_lse.template mutable_data_ptr<float>() + side * p.n;
    for (int64_t i = 0; i < p.n; ++i) {
      const double exact = static_cast<double>(highest[i]) + log_sum[i], x = exact - own[i], share = 0.5 / p.n;
      loss += share * ((x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x))) + 0 * own[i]);  // infinite features: NaN
      const double d = share / (1 + std::exp(-x));
      d_positive[i] -= d;
      lse_at[i] = exact == kNone ? -kNone : static_cast<float>(exact);  // no negatives: nothing flows there
      d_at[i] = exact == kNone ? 0.f : static_cast<float>(d * std::exp(lse_at[i] - exact));
    }
  }
  auto [grad_image, grad_text] = negative_gradients(p, lse[0], lse[1], d_lse[0], d_lse[1]);
  const T *image = p.image.template const_data_ptr<T>(), *text = p.text.template const_data_ptr<T>();
  const double d_scale = finish_gradient(grad_image.template mutable_data_ptr<float>(), image, text, d_positive.data(), p.scale, p.n, p.depth);
  finish_gradient(grad_text.template mutable_data_ptr<float>(), text, image, d_positive.data(), p.scale, p.n, p.depth);
  return {empty({}).fill_(loss), grad_image, grad_text, empty({}).fill_(d_scale)};
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
    const std::optional<at::Tensor>& labels, const std::optional<at::Tensor>& row_groups, const std::optional<at::Tensor>& col_groups,
    const std::optional<at::Tensor>& kept) {
  const Ids own(labels), rows(row_groups), cols(col_groups);
  const Pairing pairing{offset, own.data(), rows.data(), cols.data()};
  return by_type(image_features, [&](auto type) {
    return statistics(Problem<decltype(type)>(image_features, text_features, logit_scale, kept, pairing));
  });
}

std::tuple<at::Tensor, at::Tensor> contrastive_loss_negative_gradients(
    const at::Tensor& image_features, const at::Tensor& text_features, const at::Tensor& logit_scale, const at::Tensor& row_lse,
    const at::Tensor& col_lse, const at::Tensor& d_row_lse, const at::Tensor& d_col_lse, int64_t offset,
    const std::optional<at::Tensor>& labels, const std::optional<at::Tensor>& row_groups, const std::optional<at::Tensor>& col_groups,
    const std::optional<at::Tensor>& kept) {
  const Ids own(labels), rows(row_groups), cols(col_groups);
  const Pairing pairing{offset, own.data(), rows.data(), cols.data()};
  const auto [grad_image, grad_text] = by_type(image_features, [&](auto type) {
    return negative_gradients(Problem<decltype(type)>(image_features, text_features, logit_scale, kept, pairing), row_lse, col_lse, d_row_lse,
                              d_col_lse);
  });
  const int64_t depth = image_features.size(1);
  return {grad_image.narrow(1, 0, depth).contiguous(), grad_text.narrow(1, 0, depth).contiguous()};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> contrastive_loss_mean(const at::Tensor& image_features,
                                                                                 const at::Tensor& text_features,
                                                                                 const at::Tensor& logit_scale) {
  const auto [loss, grad_image, grad_text, d_scale] = by_type(image_features, [&](auto type) {
    return mean_loss(Problem<decltype(type)>(image_features, text_features, logit_scale, std::nullopt, {0, nullptr, nullptr, nullptr}));
  });
  const int64_t depth = image_features.size(1);
  return {loss, grad_image.narrow(1, 0, depth).contiguous(), grad_text.narrow(1, 0, depth).contiguous(), d_scale};
}

}  // namespace fastclip
