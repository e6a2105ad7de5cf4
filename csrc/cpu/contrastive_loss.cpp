// The contrastive block on the CPU: statistics of the negatives of every row and column, and their gradient.
//
// Logits live in tiles of 128 rows and up to 1024 columns, made by the library's micro-kernels (products.h) and used up in the
// second-level cache by vectorised passes over their rows and columns. bfloat16 features are multiplied as they are, with fp32
// logits and bfloat16 dz, where the processor has 16-bit products, and widened where it has none. Tiles are cut the same way and
// summed in the same order whatever the number of threads, so the result does not depend on it. See
// ops/contrastive_loss/reference.py for the maths.
#include <tuple>
#include <type_traits>

#include "contrastive_skipping.h"
#include "contrastive_tiles.h"

namespace fastclip {
namespace {

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

template <typename T>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> statistics(Problem<T> p, at::Tensor largest = {}) {
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
        if (largest.defined()) block_maxima(at(part_max, k * width), t.padded, at(largest, k * largest.size(1) + col / kBlock));
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

// `skipping`: of fp32 features, what to leave out of the gradients, and afterwards how much that was.
template <typename T>
std::tuple<at::Tensor, at::Tensor> negative_gradients(Problem<T> p, const at::Tensor& row_lse, const at::Tensor& col_lse,
                                                      const at::Tensor& d_row_lse, const at::Tensor& d_col_lse,
                                                      Skipping* skipping = nullptr) {
  constexpr bool kNarrow = !std::is_same_v<T, float>;
  const auto empty = [&](at::IntArrayRef sizes) { return p.image.new_empty(sizes, at::kFloat); };
  const int64_t width = p.tile_cols(), step = p.tile_rows();
  const int64_t groups = (p.n + kGroup - 1) / kGroup, group_rows = p.group_rows();
  const auto row = row_lse.contiguous(), d_row = d_row_lse.contiguous();
  const auto tail = ceil_to(p.m, kBlock) - p.m;  // a tile reads whole vectors of columns
  const auto col = zero_padded(col_lse, tail), d_col = zero_padded(d_col_lse, tail);
  auto grad_image = empty({p.n, p.depth}), grad_text = empty({ceil_to(p.m, kBlock), p.depth});
  if (skipping) grad_image.zero_(), grad_text.zero_();  // a product that is left out sets nothing
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
      const int64_t first = g * kGroup, count = std::min(kGroup, p.n - first), tiles = (count + step - 1) / step;
      at::parallel_for(0, tiles, p.grain(count, 1), [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k) {
          const int64_t i = first + k * step;
          Tile t = p.place(mine<float>(tile_scratch), i, first_col);
          if (!t.is_finished && !skipping) p.multiply(t, i);
          const Lse lse{row_at + i, col_at + first_col, d_row_at + i, d_col_at + first_col};
          T* left;
          if constexpr (kNarrow) {
            left = mine<T>(narrow_scratch);
            float *of_rows = row_sums.template mutable_data_ptr<float>() + i, *of_cols = tile_sums.template mutable_data_ptr<float>() + k * width;
            const Rounding sums{of_rows, of_rows + p.n, of_cols, of_cols + group_tiles * width};
            differentiate(t, p.scale, lse, left, ld, blocked + k * step * kBlock, stride, sums);
          } else {
            left = mine<float>(tile_scratch);
            if (skipping)
              skipping->fill(p, t, k, i, first_col, lse, blocked + k * step * kBlock, stride);
            else
              differentiate(t, p.scale, lse, left, ld, blocked + k * step * kBlock, stride);
          }
          const T* right = p.blocked.template const_data_ptr<T>();
          each_run(skipping ? skipping->flags(k) : nullptr, blocks, 1, [&](int64_t from, int64_t to) {
            const int64_t j = from * kBlock, terms = std::min(to * kBlock, cols) - j;
            for (int64_t d = 0; d < p.depth; d += kBlock)
              product(t.rows, std::min(kBlock, p.depth - d), terms, left + j, ld, right + d * cols + j * kBlock, grad_image_at + i * p.depth + d,
                      p.depth, first_col > 0 || skipping);
          });
        }
        release<T>();
      });
      if constexpr (kNarrow) {
        col_sums.narrow(1, first_col, cols).add_(tile_sums.narrow(1, 0, tiles).narrow(2, 0, cols).sum(1));
      }
      if (skipping) skipping->finish(tiles, first_col, cols);
      // d_text, transposed: (D, rows of the group) dz, 64 columns at a time.
      const T* left = image_transposed.template const_data_ptr<T>() + g * p.depth * group_rows;
      at::parallel_for(0, blocks * (p.depth / kDepth), p.grain(cols * p.depth, 8), [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t j = task / (p.depth / kDepth), d = task % (p.depth / kDepth) * kDepth;
          each_run(skipping ? skipping->flags(0) + j : nullptr, tiles, p.tile_cols() / kBlock, [&](int64_t from, int64_t to) {
            const int64_t row = from * step, terms = ceil_to(std::min(to * step, count) - row, kInterleaved<T>);
            product(kDepth, std::min(kBlock, cols - j * kBlock), terms, left + d * group_rows + row, group_rows,
                    blocked + j * stride + row * kBlock, grad_text_at + (first_col + j * kBlock) * p.depth + d * kBlock, kBlock,
                    g > 0 || skipping);
          });
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

// The same in fp32 and the largest logit of each block (row tiles, column blocks), by which the gradients leave blocks out.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> contrastive_loss_statistics_and_largest(
    const at::Tensor& image_features, const at::Tensor& text_features, const at::Tensor& logit_scale, int64_t offset,
    const std::optional<at::Tensor>& labels, const std::optional<at::Tensor>& row_groups, const std::optional<at::Tensor>& col_groups) {
  const Ids own(labels), rows(row_groups), cols(col_groups);
  const Problem<float> p(image_features, text_features, logit_scale, std::nullopt, {offset, own.data(), rows.data(), cols.data()});
  const at::Tensor largest = p.image.new_empty(p.blocks());
  return std::tuple_cat(statistics(p, largest), std::make_tuple(largest));
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

// (d_image, d_text, what was left out of the rows of each, in sums of |dz|, the shares of blocks left out early and late).
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> contrastive_loss_skipping_gradients(
    const at::Tensor& image_features, const at::Tensor& text_features, const at::Tensor& logit_scale, const at::Tensor& row_lse,
    const at::Tensor& col_lse, const at::Tensor& d_row_lse, const at::Tensor& d_col_lse, int64_t offset,
    const std::optional<at::Tensor>& labels, const std::optional<at::Tensor>& row_groups, const std::optional<at::Tensor>& col_groups,
    const at::Tensor& largest, double tolerance) {
  const Ids own(labels), rows(row_groups), cols(col_groups);
  const Problem<float> p(image_features, text_features, logit_scale, std::nullopt, {offset, own.data(), rows.data(), cols.data()});
  Skipping skipping(p, largest, tolerance, row_lse.contiguous(), col_lse.contiguous(), d_row_lse.contiguous(), d_col_lse.contiguous());
  const auto [grad_image, grad_text] = negative_gradients(p, row_lse, col_lse, d_row_lse, d_col_lse, &skipping);
  const int64_t depth = image_features.size(1);
  const auto cut = [&](const at::Tensor& x) { return x.narrow(1, 0, depth).contiguous(); };
  return {cut(grad_image), cut(grad_text), skipping.of_rows, skipping.of_cols.narrow(0, 0, p.m).contiguous(), skipping.shares()};
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
