// The sigmoid block on Hopper: one pass over the logits for each row's sum of losses and of dz, which writes dz too where
// a gradient is wanted. See fastclip/ops/sigmoid_loss/triton.py for what it computes; this is the same in CUDA.
#include "launch.h"
#include "pairs.cuh"

namespace fastclip {
namespace {

// log(1 + e^x) and 1 / (1 + e^-x), to a few ulp however negative x is, with one exponential and one division: with t =
// e^-|x| and s = t / (2 + t), at most 1/3, log(1 + t) = 2 artanh(s).
__device__ __forceinline__ float softplus_and_sigmoid(float x, float& sigmoid) {
  const float t = power_of_two(-fabsf(x) * LOG2E), a = t + 1, b = t + 2;
  const float inverse = __fdividef(1.0f, a * b), s = t * a * inverse, s2 = s * s;
  float y = s2 * (1.0f / 15) + 1.0f / 13;
  y = y * s2 + 1.0f / 11;
  y = y * s2 + 1.0f / 9;
  y = y * s2 + 1.0f / 7;
  y = y * s2 + 1.0f / 5;
  y = y * s2 + 1.0f / 3;
  sigmoid = (x < 0 ? t : 1.0f) * b * inverse;
  return fmaxf(x, 0.0f) + 2 * (s + s * s2 * y);
}

template <bool RESIDENT>
struct SigmoidMemory {
  static constexpr int STAGES = RESIDENT ? 4 : 5;
  using Copies = Pipeline<RESIDENT, STAGES>;
  static constexpr int BYTES = Copies::BYTES + 2 * Store::BYTES + 8 * Copies::BARRIERS;
};

// row_sums: (2 * parts, n) of (loss, dz), a row for each warpgroup; d_logits, weights_i dz_ij, where `weights` is given.
template <typename T, bool RESIDENT>
__global__ void __launch_bounds__(THREADS, 1)
sigmoid_kernel(const __grid_constant__ CUtensorMap row_map, const __grid_constant__ CUtensorMap column_map,
               const __grid_constant__ CUtensorMap out_map, const float* scale_of, const float* bias_of, Labels own,
               const float* weights, float2* row_sums, int columns_per_part, int steps) {
  using Memory = SigmoidMemory<RESIDENT>;
  extern __shared__ __align__(1024) char memory[];
  char* stores = memory + Memory::Copies::BYTES;
  uint64_t* barriers = reinterpret_cast<uint64_t*>(stores + 2 * Store::BYTES);
  const typename Memory::Copies pipeline(memory, barriers);
  if (threadIdx.x == 0) pipeline.init();
  cluster_sync();
  const Share share(own, columns_per_part, steps);
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
  const float scale = *scale_of, bias = *bias_of;
  const int tiles = share.tiles();
  const Store store(stores + warpgroup * Store::BYTES, warpgroup, place);
  row_sums += static_cast<int64_t>(2 * blockIdx.y + warpgroup) * own.rows;
  for (int block = share.first_block, sweep = 0; share.has(block); block += share.block_stride, sweep++) {
    float loss[4] = {0, 0, 0, 0}, total[4] = {0, 0, 0, 0}, weight[4];
#pragma unroll
    for (int r = 0; r < 4; r++) {
      const int row = block * TILE + place.row(r);
      weight[r] = weights != nullptr && row < own.rows ? weights[row] : 0;
    }
    for (int tile = warpgroup; tile < tiles; tile += 2) {
      const int column = share.first_column + tile * TILE;
      float acc[2][64];
      pipeline.template multiply<T>(acc, share, sweep, tile);
      const bool masked = is_masked(place, block * TILE, column, own);
#pragma unroll
      for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int r = 2 * half; r < 2 * half + 2; r++) {
          const int label = own.of(block * TILE + place.row(r)) - column, end = own.columns - column;
          float loss_here = 0, total_here = 0;
#pragma unroll
          for (int c = 0; c < 32; c++) {
            float& x = element(acc, r, c);
            float sigmoid;
            float softplus = softplus_and_sigmoid(x * scale + bias, sigmoid);
            if (masked && (place.column(c) == label || place.column(c) >= end)) softplus = sigmoid = 0;
            loss_here += softplus;
            total_here += sigmoid;
            x = sigmoid * weight[r];
          }
          loss[r] += loss_here;
          total[r] += total_here;
        }
        if (weights != nullptr) store.put(acc[half], &out_map, block * TILE + half * 64, column);
      }
    }
    pipeline.leave_rows(sweep);
#pragma unroll
    for (int r = 0; r < 4; r++) {
      float2 sums = make_float2(loss[r], total[r]);
#pragma unroll
      for (int lanes = 1; lanes < 4; lanes *= 2) {
        sums.x += __shfl_xor_sync(~0u, sums.x, lanes);
        sums.y += __shfl_xor_sync(~0u, sums.y, lanes);
      }
      const int row = block * TILE + place.row(r);
      if (place.lane % 4 == 0 && row < own.rows) row_sums[row] = sums;
    }
  }
  store.finish();
  cluster_sync();
}

}  // namespace
}  // namespace fastclip

using namespace fastclip;

extern "C" int fastclip_sigmoid(const void* image, const void* text, const float* scale, const float* bias,
                                const float* weights, void* row_sums, void* d_logits, int n, int m, int d, int is_half,
                                int offset, int stride, int processors, cudaStream_t stream) {
  CUtensorMap rows, columns, out{};
  if (!make_map(&rows, image, is_half, n, d, d, TILE) || !make_map(&columns, text, is_half, m, d, d, TILE / CLUSTER) ||
      (d_logits != nullptr && !make_map(&out, d_logits, true, n, m, stride, 64))) {
    return cudaErrorInvalidValue;
  }
  const int steps = (d + STEP - 1) / STEP;
  const Labels own{nullptr, offset, n, m};
  const Grid grid(n, m, processors);
  auto launch = [&](auto kernel, int bytes) -> int {
    return start(kernel, grid, bytes, stream, rows, columns, out, scale, bias, own, weights,
                 static_cast<float2*>(row_sums), grid.columns_per_part, steps);
  };
  if (steps <= RESIDENT_STEPS) {
    constexpr int bytes = SigmoidMemory<true>::BYTES;
    return is_half ? launch(sigmoid_kernel<__half, true>, bytes) : launch(sigmoid_kernel<__nv_bfloat16, true>, bytes);
  }
  constexpr int bytes = SigmoidMemory<false>::BYTES;
  return is_half ? launch(sigmoid_kernel<__half, false>, bytes) : launch(sigmoid_kernel<__nv_bfloat16, false>, bytes);
}
