// The contrastive block on Hopper: one pass over the logits for the statistics of rows and columns, and another that
// writes dz. See fastclip/ops/contrastive_loss/triton.py for what both compute; this is the same in CUDA.
#include "launch.h"
#include "order.cuh"
#include "pairs.cuh"

namespace fastclip {
namespace {

constexpr float EMPTY = -1e30f;  // the maximum of no cosines: finite, so that differences from it are never NaN
constexpr float SPREAD = 80.0f;  // powers of two within which one exponential serves rows and columns

__device__ __forceinline__ float power(float x, float reference, float rate) {
  return power_of_two((x - reference) * rate);
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, lanes));
  return x;
}

__device__ __forceinline__ float warp_min(float x) { return -warp_max(-x); }

struct Max {
  __device__ static float of(float x, float y) { return fmaxf(x, y); }
};

struct Sum {
  __device__ static float of(float x, float y) { return x + y; }
};

// Over the lanes that differ in the bits from `LANES` down to 4; x[0 .. HALF - 1] are kept, of the upper half where
// the lane has that bit.
template <typename Op, int HALF, int LANES>
__device__ __forceinline__ void reduce_halves(float (&x)[32], int lane) {
  const bool is_upper = lane & LANES;
#pragma unroll
  for (int i = 0; i < HALF; i++) {
    const float sent = is_upper ? x[i] : x[i + HALF], kept = is_upper ? x[i + HALF] : x[i];
    x[i] = Op::of(kept, __shfl_xor_sync(~0u, sent, LANES));
  }
  if constexpr (LANES > 4) reduce_halves<Op, HALF / 2, LANES / 2>(x, lane);
}

// Over the 8 lanes that hold the same 32 columns; each keeps 4 of them: x[0 .. 3] of column first_column(lane) and on.
template <typename Op>
__device__ __forceinline__ void reduce_columns(float (&x)[32], int lane) {
  reduce_halves<Op, 16, 16>(x, lane);
}

__device__ __forceinline__ int first_column(int lane) {
  return (lane & 16 ? 16 : 0) + (lane & 8 ? 8 : 0) + (lane & 4 ? 4 : 0);
}

// EMPTY where there is no negative; the row's positive is written.
__device__ __forceinline__ void mask_tile(float (&acc)[2][64], const Place& place, int first_row, int column,
                                          const Labels& labels, float scale, float* positive) {
#pragma unroll
  for (int r = 0; r < 4; r++) {
    const int row = first_row + place.row(r), label = labels.of(row);
#pragma unroll
    for (int c = 0; c < 32; c++) {
      float& x = element(acc, r, c);
      const int at = column + place.column(c);
      if (row < labels.rows && at == label && at < labels.columns) positive[row] = x * scale;
      if (row >= labels.rows || at >= labels.columns || at == label) x = EMPTY;
    }
  }
}

struct RowState {
  float highest[4], total[4];  // of this thread's part of each row, as `_fold` in triton.py has them
};

// The sums of the tile's columns in this warp, each beside its maximum; and the tile folded into the rows' state.
__device__ __forceinline__ void fold(float (&acc)[2][64], RowState& rows, float2* columns, const Place& place,
                                     float rate) {
  float top[4], column_top[32];
#pragma unroll
  for (int r = 0; r < 4; r++) top[r] = element(acc, r, 0);
#pragma unroll
  for (int c = 0; c < 32; c++) {
    column_top[c] = element(acc, 0, c);
#pragma unroll
    for (int r = 0; r < 4; r++) {
      top[r] = fmaxf(top[r], element(acc, r, c));
      if (r > 0) column_top[c] = fmaxf(column_top[c], element(acc, r, c));
    }
  }
  reduce_columns<Max>(column_top, place.lane);
  const float highest = warp_max(fmaxf(fmaxf(top[0], top[1]), fmaxf(top[2], top[3])));
  const float lowest_row = fminf(fminf(top[0], top[1]), fminf(top[2], top[3]));
  const float lowest_column = fminf(fminf(column_top[0], column_top[1]), fminf(column_top[2], column_top[3]));
  const bool shares = highest > EMPTY && (highest - warp_min(fminf(lowest_row, lowest_column))) * rate < SPREAD;

  const int first = first_column(place.lane);
#pragma unroll
  for (int i = 0; i < 4; i++) columns[place.column(first + i)].x = column_top[i];

  float part[4] = {0, 0, 0, 0}, sums[32];
  if (shares) {
#pragma unroll
    for (int c = 0; c < 32; c++) {
      sums[c] = 0;
#pragma unroll
      for (int r = 0; r < 4; r++) {
        const float e = power(element(acc, r, c), highest, rate);
        part[r] += e;
        sums[c] += e;
      }
    }
#pragma unroll
    for (int r = 0; r < 4; r++) {
      const float both = fmaxf(rows.highest[r], top[r]);
      rows.total[r] = rows.total[r] * power(rows.highest[r], both, rate) + part[r] * power(highest, both, rate);
      rows.highest[r] = both;
    }
    reduce_columns<Sum>(sums, place.lane);
#pragma unroll
    for (int i = 0; i < 4; i++) columns[place.column(first + i)].y = sums[i] * power(highest, column_top[i], rate);
  } else {
    __syncwarp();
#pragma unroll
    for (int r = 0; r < 4; r++) {
      const float both = fmaxf(rows.highest[r], top[r]);
      rows.total[r] *= power(rows.highest[r], both, rate);
      rows.highest[r] = both;
    }
#pragma unroll
    for (int c = 0; c < 32; c++) {
      const float reference = columns[place.column(c)].x;
      sums[c] = 0;
#pragma unroll
      for (int r = 0; r < 4; r++) {
        const float x = element(acc, r, c);
        if (x != EMPTY) {
          rows.total[r] += power(x, rows.highest[r], rate);
          sums[c] += power(x, reference, rate);
        }
      }
    }
    reduce_columns<Sum>(sums, place.lane);
#pragma unroll
    for (int i = 0; i < 4; i++) columns[place.column(first + i)].y = sums[i];
  }
}

// (max, sum) of two sets.
__device__ __forceinline__ float2 merge(float2 a, float2 b, float rate) {
  const float highest = fmaxf(a.x, b.x);
  return make_float2(highest, a.y * power(a.x, highest, rate) + b.y * power(b.x, highest, rate));
}

template <bool RESIDENT>
struct StatisticsMemory {
  static constexpr int STAGES = RESIDENT ? 5 : 6;
  using Copies = Pipeline<RESIDENT, STAGES>;
  static constexpr int COLUMN_BYTES = 2 * 2 * 4 * TILE * static_cast<int>(sizeof(float2));  // warpgroup, turn, warp
  static constexpr int BYTES = Copies::BYTES + COLUMN_BYTES + 8 * Copies::BARRIERS;
};

// Row blocks blockIdx.x, + gridDim.x, ...; part blockIdx.y of the columns. row_state: (2 * parts, n), a row for each
// warpgroup; column_state: (gridDim.x, m); both of (max, sum) as `fold` has them.
template <typename T, bool RESIDENT>
__global__ void __launch_bounds__(THREADS, 1)
statistics_kernel(const __grid_constant__ CUtensorMap row_map, const __grid_constant__ CUtensorMap column_map,
                  const float* scale_of, Labels labels, float* positive, float2* row_state, float2* column_state,
                  int columns_per_part, int steps) {
  using Memory = StatisticsMemory<RESIDENT>;
  extern __shared__ __align__(1024) char memory[];
  float2* column_parts = reinterpret_cast<float2*>(memory + Memory::Copies::BYTES);
  uint64_t* barriers = reinterpret_cast<uint64_t*>(memory + Memory::Copies::BYTES + Memory::COLUMN_BYTES);
  const typename Memory::Copies pipeline(memory, barriers);
  if (threadIdx.x == 0) pipeline.init();
  cluster_sync();
  const Share share(labels, columns_per_part, steps);
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 2) {
    fewer_registers<COPIER_REGISTERS>();
    if (threadIdx.x == 2 * 128) pipeline.copy(&row_map, &column_map, share);
    __syncwarp();
    cluster_sync();  // until the neighbour needs this one's memory no more
    return;
  }
  more_registers<WORKER_REGISTERS>();
  const Place place;
  const float scale = *scale_of, rate = scale * LOG2E;
  const int tiles = share.tiles(), thread = threadIdx.x % 128;
  column_state += static_cast<int64_t>(blockIdx.x) * labels.columns;
  row_state += static_cast<int64_t>(2 * blockIdx.y + warpgroup) * labels.rows;
  int turn = 0;
  for (int block = share.first_block, sweep = 0; share.has(block); block += share.block_stride, sweep++) {
    RowState rows;
#pragma unroll
    for (int r = 0; r < 4; r++) rows.highest[r] = EMPTY, rows.total[r] = 0;
    for (int tile = warpgroup; tile < tiles; tile += 2, turn ^= 1) {
      const int column = share.first_column + tile * TILE;
      const bool has_column = column + thread < labels.columns;
      float2 state = make_float2(EMPTY, 0);
      if (sweep > 0 && has_column) state = column_state[column + thread];
      float acc[2][64];
      pipeline.template multiply<T>(acc, share, sweep, tile);
      if (is_masked(place, block * TILE, column, labels)) {
        mask_tile(acc, place, block * TILE, column, labels, scale, positive);
      }
      float2* parts = column_parts + (warpgroup * 2 + turn) * 4 * TILE;
      fold(acc, rows, parts + place.warp * TILE, place, rate);
      warpgroup_sync(warpgroup);
#pragma unroll
      for (int warp = 0; warp < 4; warp++) state = merge(state, parts[warp * TILE + thread], rate);
      if (has_column) column_state[column + thread] = state;
    }
    pipeline.leave_rows(sweep);
#pragma unroll
    for (int r = 0; r < 4; r++) {
      float2 state = make_float2(rows.highest[r], rows.total[r]);
#pragma unroll
      for (int lanes = 1; lanes < 4; lanes *= 2) {
        const float2 other = make_float2(__shfl_xor_sync(~0u, state.x, lanes), __shfl_xor_sync(~0u, state.y, lanes));
        state = merge(state, other, rate);
      }
      const int row = block * TILE + place.row(r);
      if (place.lane % 4 == 0 && row < labels.rows) row_state[row] = state;
    }
  }
  cluster_sync();
}

struct Weights {
  const float *row_lse, *column_lse, *d_row, *d_column;  // lse / scale; see `Weights` in chunks.py
  const uint32_t* bounds;  // of rows and columns, by `fastclip_weights`: the largest |d|, the bounds of lse / scale

  // 2^14 / the largest |d|: |dz| is at most 2^15 with it, below float16's 65504.
  __device__ float unit() const { return 16384.0f / fmaxf(__uint_as_float(bounds[0]), 1.17549435e-38f); }
};

template <bool RESIDENT>
struct GradientMemory {
  static constexpr int STAGES = RESIDENT ? 4 : 5;
  using Copies = Pipeline<RESIDENT, STAGES>;
  static constexpr int COLUMN_BYTES = 2 * TILE * static_cast<int>(sizeof(float));
  static constexpr int BYTES = Copies::BYTES + 2 * (Store::BYTES + COLUMN_BYTES) + 8 * Copies::BARRIERS;
};

template <typename T, bool RESIDENT>
__global__ void __launch_bounds__(THREADS, 1)
d_logits_kernel(const __grid_constant__ CUtensorMap row_map, const __grid_constant__ CUtensorMap column_map,
                const __grid_constant__ CUtensorMap out_map, const float* scale_of, Labels labels, Weights weights,
                int columns_per_part, int steps) {
  using Memory = GradientMemory<RESIDENT>;
  extern __shared__ __align__(1024) char memory[];
  char* stores = memory + Memory::Copies::BYTES;
  char* column_memory = stores + 2 * Store::BYTES;
  uint64_t* barriers = reinterpret_cast<uint64_t*>(column_memory + 2 * Memory::COLUMN_BYTES);
  const typename Memory::Copies pipeline(memory, barriers);
  if (threadIdx.x == 0) pipeline.init();
  cluster_sync();
  const Share share(labels, columns_per_part, steps);
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 2) {
    fewer_registers<COPIER_REGISTERS>();
    if (threadIdx.x == 2 * 128) pipeline.copy(&row_map, &column_map, share);
    __syncwarp();
    cluster_sync();  // until the neighbour needs this one's memory no more
    return;
  }
  more_registers<WORKER_REGISTERS>();
  const Place place;
  const float rate = *scale_of * LOG2E, unit = weights.unit();
  const float highest = from_order(weights.bounds[1]), lowest = -from_order(weights.bounds[2]);
  const bool shares = (highest - lowest) * rate < SPREAD;
  const int tiles = share.tiles(), thread = threadIdx.x % 128;
  const Store store(stores + warpgroup * Store::BYTES, warpgroup, place);
  float* column_d = reinterpret_cast<float*>(column_memory + warpgroup * Memory::COLUMN_BYTES);
  float* column_lse = column_d + TILE;
  for (int block = share.first_block, sweep = 0; share.has(block); block += share.block_stride, sweep++) {
    float lse[4], d_row[4];
#pragma unroll
    for (int r = 0; r < 4; r++) {
      const int row = block * TILE + place.row(r);
      lse[r] = row < labels.rows ? weights.row_lse[row] : INFINITY;
      d_row[r] = row < labels.rows ? weights.d_row[row] * unit : 0;
      if (shares) d_row[r] *= row < labels.rows ? power(highest, lse[r], rate) : 0;
    }
    for (int tile = warpgroup; tile < tiles; tile += 2) {
      const int column = share.first_column + tile * TILE;
      float own_d = 0, own_lse = INFINITY;  // of the column of this thread's number
      if (column + thread < labels.columns) {
        own_d = weights.d_column[column + thread] * unit, own_lse = weights.column_lse[column + thread];
        if (shares) own_d *= power(highest, own_lse, rate);
      }
      float acc[2][64];
      pipeline.template multiply<T>(acc, share, sweep, tile);
      column_d[thread] = own_d, column_lse[thread] = own_lse;  // all have read the tile before: they have met since
      warpgroup_sync(warpgroup);
      const bool masked = is_masked(place, block * TILE, column, labels);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        if (shares) {
#pragma unroll
          for (int c = 0; c < 32; c += 2) {
            const float2 d_column = *reinterpret_cast<const float2*>(column_d + place.column(c));
#pragma unroll
            for (int r = 2 * half; r < 2 * half + 2; r++) {
              element(acc, r, c) = power(element(acc, r, c), highest, rate) * (d_row[r] + d_column.x);
              element(acc, r, c + 1) = power(element(acc, r, c + 1), highest, rate) * (d_row[r] + d_column.y);
            }
          }
        } else {
#pragma unroll
          for (int c = 0; c < 32; c++) {
            const float d_column = column_d[place.column(c)], lse_column = column_lse[place.column(c)];
#pragma unroll
            for (int r = 2 * half; r < 2 * half + 2; r++) {
              float& x = element(acc, r, c);
              x = d_row[r] * power(x, lse[r], rate) + d_column * power(x, lse_column, rate);
            }
          }
        }
        if (masked) {
#pragma unroll
          for (int r = 2 * half; r < 2 * half + 2; r++) {
            const int label = labels.of(block * TILE + place.row(r)) - column;
#pragma unroll
            for (int c = 0; c < 32; c++) {
              if (place.column(c) == label) element(acc, r, c) = 0;
            }
          }
        }
        store.put(acc[half], &out_map, block * TILE + half * 64, column);
      }
    }
    pipeline.leave_rows(sweep);
  }
  store.finish();
  cluster_sync();
}

}  // namespace
}  // namespace fastclip

using namespace fastclip;

extern "C" int64_t fastclip_grid(int n, int m, int processors) {
  const Grid grid(n, m, processors);
  return static_cast<int64_t>(grid.programs) << 32 | grid.parts;
}

extern "C" int fastclip_statistics(const void* image, const void* text, const float* scale,
                                               const int64_t* labels, float* positive, void* row_state,
                                               void* column_state, int n, int m, int d, int is_half, int offset,
                                               int processors, cudaStream_t stream) {
  CUtensorMap rows, columns;
  if (!make_map(&rows, image, is_half, n, d, d, TILE) || !make_map(&columns, text, is_half, m, d, d, TILE / CLUSTER)) {
    return cudaErrorInvalidValue;
  }
  const int steps = (d + STEP - 1) / STEP;
  const Labels positives{labels, offset, n, m};
  const Grid grid(n, m, processors);
  auto launch = [&](auto kernel, int bytes) -> int {
    return start(kernel, grid, bytes, stream, rows, columns, scale, positives, positive,
                 static_cast<float2*>(row_state), static_cast<float2*>(column_state), grid.columns_per_part, steps);
  };
  if (steps <= RESIDENT_STEPS) {
    constexpr int bytes = StatisticsMemory<true>::BYTES;
    return is_half ? launch(statistics_kernel<__half, true>, bytes)
                   : launch(statistics_kernel<__nv_bfloat16, true>, bytes);
  }
  constexpr int bytes = StatisticsMemory<false>::BYTES;
  return is_half ? launch(statistics_kernel<__half, false>, bytes)
                 : launch(statistics_kernel<__nv_bfloat16, false>, bytes);
}

extern "C" int fastclip_d_logits(const void* image, const void* text, const float* scale,
                                             const int64_t* labels, const float* row_lse, const float* column_lse,
                                             const float* d_row, const float* d_column, const uint32_t* bounds,
                                             void* d_logits, int n, int m, int d, int is_half, int offset, int stride,
                                             int processors, cudaStream_t stream) {
  CUtensorMap rows, columns, out;
  if (!make_map(&rows, image, is_half, n, d, d, TILE) || !make_map(&columns, text, is_half, m, d, d, TILE / CLUSTER) ||
      !make_map(&out, d_logits, true, n, m, stride, 64)) {
    return cudaErrorInvalidValue;
  }
  const int steps = (d + STEP - 1) / STEP;
  const Labels positives{labels, offset, n, m};
  const Grid grid(n, m, processors);
  const Weights weights{row_lse, column_lse, d_row, d_column, bounds};
  auto launch = [&](auto kernel, int bytes) -> int {
    return start(kernel, grid, bytes, stream, rows, columns, out, scale, positives, weights,
                 grid.columns_per_part, steps);
  };
  if (steps <= RESIDENT_STEPS) {
    constexpr int bytes = GradientMemory<true>::BYTES;
    return is_half ? launch(d_logits_kernel<__half, true>, bytes)
                   : launch(d_logits_kernel<__nv_bfloat16, true>, bytes);
  }
  constexpr int bytes = GradientMemory<false>::BYTES;
  return is_half ? launch(d_logits_kernel<__half, false>, bytes)
                 : launch(d_logits_kernel<__nv_bfloat16, false>, bytes);
}
