// A backward that leaves out the blocks of dz with next to no weight, and says how much that was.
//
// A block is 128 (or 32) rows of a tile and 64 columns. Each has an equal share of what may be left out in all. By the largest of
// its logits, which the forward pass has kept, and the log-sum-exp of its rows and columns one that stays far below its share is
// left out before its logits are made again: it costs nothing. The others are made, and left out of the two products that follow
// where the sum of their |dz| is below the share. What is left out is added up by row and by column, early ones by their bound.
#pragma once

#include <atomic>
#include <vector>

#include "contrastive_tiles.h"

namespace fastclip {
namespace {

constexpr float kEarly = 0.1f;  // of its share: the most that the bound of a block may be that is left out unseen

// visit(from, to) for every run of blocks that are not left out, of `count` flags `step` apart; all of them without flags.
template <typename Visit>
void each_run(const char* is_out, int64_t count, int64_t step, const Visit& visit) {
  for (int64_t from = 0, to; from < count; from = to + 1) {
    to = from;
    while (to < count && !(is_out && is_out[to * step])) ++to;
    if (to > from) visit(from, to);
  }
}

// The largest of each kBlock of the numbers of `padded` columns.
FASTCLIP_MULTIVERSION void block_maxima(const float* highest, int64_t padded, float* out) {
  for (int64_t j = 0; j < padded; j += kBlock) {
    Vec top = splat(kNone);
    for (int64_t k = j; k < std::min(j + kBlock, padded); k += kLanes) top = maximum(load(highest + k), top);
    out[j / kBlock] = maximum(top);
  }
}

// The sums of |dz| of a block's rows and columns; returns that of all.
FASTCLIP_MULTIVERSION float absolute_sums(const float* dz, int64_t ld, int64_t rows, int64_t padded, float* of_rows, float* of_cols) {
  std::fill(of_cols, of_cols + padded, 0.f);
  float total = 0.f;
  for (int64_t i = 0; i < rows; ++i) {
    Vec row = {};
    for (int64_t j = 0; j < padded; j += kLanes) {
      const Vec d = load(dz + i * ld + j), size = d < 0.f ? -d : d;
      row += size;
      store(of_cols + j, load(of_cols + j) + size);
    }
    total += of_rows[i] = sum(row);
  }
  return total;
}

struct Skipping {
  at::Tensor largest;                     // (row tiles, column blocks), of the finished logits
  at::Tensor of_rows, of_cols;            // (n), (m padded to whole blocks): what was left out
  at::Tensor of_tiles;                    // the columns' part of each tile of one group and one stretch of columns
  std::vector<char> is_out;               // of those tiles, by tile and block
  std::vector<float> row_weight, col_weight;  // the largest log |d_lse| - lse of each tile and block
  std::atomic<int64_t> early{0}, late{0};     // how many blocks were left out
  double share;    // of a block, in sums of |dz|
  int64_t blocks;  // of a stretch of columns

  // lse and d_lse (n) of rows and (m) of columns, contiguous.
  Skipping(const Problem<float>& p, const at::Tensor& largest, double tolerance, const at::Tensor& row_lse, const at::Tensor& col_lse,
           const at::Tensor& d_row_lse, const at::Tensor& d_col_lse)
      : largest(largest),
        of_rows(p.image.new_zeros({p.n})),
        of_cols(p.image.new_zeros({ceil_to(p.m, kBlock)})),
        of_tiles(p.image.new_empty({p.group_rows() / p.tile_rows(), p.tile_cols()})),
        is_out(of_tiles.size(0) * (p.tile_cols() / kBlock)),
        row_weight(weights(row_lse, d_row_lse, p.tile_rows())),
        col_weight(weights(col_lse, d_col_lse, kBlock)),
        share(tolerance * (d_row_lse.abs().sum().item<double>() + d_col_lse.abs().sum().item<double>()) / largest.numel()),
        blocks(p.tile_cols() / kBlock) {}

  static std::vector<float> weights(const at::Tensor& lse, const at::Tensor& d_lse, int64_t step) {
    std::vector<float> out((lse.size(0) + step - 1) / step, kNone);
    const float *lse_at = lse.const_data_ptr<float>(), *d_at = d_lse.const_data_ptr<float>();
    for (int64_t i = 0; i < lse.size(0); ++i) out[i / step] = std::max(out[i / step], std::log(std::abs(d_at[i])) - lse_at[i]);
    return out;
  }

  char* flags(int64_t tile) { return is_out.data() + tile * blocks; }

  // Makes the dz of a tile, in place and `blocked` as `differentiate` does, but for the blocks that it leaves out. `tile` counts
  // in the group, `row` and `col` are its first ones, lse begins with them.
  void fill(const Problem<float>& p, const Tile& t, int64_t tile, int64_t row, int64_t col, Lse lse, float* blocked, int64_t stride) {
    float *rows_out = of_rows.mutable_data_ptr<float>() + row, *cols_out = of_tiles.mutable_data_ptr<float>() + tile * p.tile_cols();
    const float* top = largest.const_data_ptr<float>() + row / p.tile_rows() * largest.size(1) + col / kBlock;
    float row_sums[kRows], col_sums[kBlock];
    std::fill(cols_out, cols_out + t.padded, 0.f);
    for (int64_t j = 0; j < t.padded; j += kBlock) {
      const int64_t b = j / kBlock, padded = std::min(kBlock, t.padded - j);
      const float most = std::exp(top[b] + row_weight[row / p.tile_rows()]) + std::exp(top[b] + col_weight[col / kBlock + b]);
      char& out = flags(tile)[b] = most * kBlock * t.rows <= kEarly * share;
      if (out) {
        ++early;
        for (int64_t i = 0; i < t.rows; ++i) rows_out[i] += most * kBlock;
        for (int64_t k = j; k < j + padded; ++k) cols_out[k] += most * t.rows;
        continue;
      }
      p.multiply_block(t, row, j);
      const Tile part{t.z + j, t.ld, t.rows, std::min(kBlock, t.cols - j), padded, t.pairing.from(0, j), false};
      const Lse its{lse.row, lse.col + j, lse.d_row, lse.d_col + j};
      differentiate(part, p.scale, its, part.z, t.ld, blocked + b * stride, stride);
      out = absolute_sums(part.z, t.ld, t.rows, padded, row_sums, col_sums) <= share;
      late += out;
      for (int64_t i = 0; out && i < t.rows; ++i) rows_out[i] += row_sums[i];
      for (int64_t k = 0; out && k < padded; ++k) cols_out[j + k] += col_sums[k];
    }
  }

  // The shares of all blocks that were left out early and late.
  at::Tensor shares() const {
    auto out = of_rows.new_empty({2});
    out.select(0, 0).fill_(static_cast<double>(early) / largest.numel());
    out.select(0, 1).fill_(static_cast<double>(late) / largest.numel());
    return out;
  }

  // Adds up the columns of the tiles of one group.
  void finish(int64_t tiles, int64_t col, int64_t cols) {
    of_cols.narrow(0, col, cols).add_(of_tiles.narrow(0, 0, tiles).narrow(1, 0, cols).sum(0));
  }
};

}  // namespace
}  // namespace fastclip
