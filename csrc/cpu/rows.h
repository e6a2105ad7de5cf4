// What the row-wise ops share: rows as padded fp32 in a thread's cache, and sums over rows in a fixed order.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "simd.h"

namespace fastclip {

constexpr int64_t kGrain = 1 << 14;  // elements worth a thread

// Blocks of rows whose sums are kept apart: as many as the rows give, whatever the number of threads.
struct RowBlocks {
  explicit RowBlocks(int64_t rows) : size(std::max<int64_t>(16, (rows + 63) / 64)), count((rows + size - 1) / size) {}
  int64_t size, count;
};

// A vector over the columns as fp32, `fallback` where there is none and in the padding.
inline std::vector<float> columns(const std::optional<at::Tensor>& x, int64_t width, float fallback) {
  std::vector<float> out(round_up(width), fallback);
  if (x.has_value()) {
    const auto values = x->to(at::kFloat).contiguous();
    std::copy_n(values.const_data_ptr<float>(), width, out.begin());
  }
  return out;
}

// `width` elements as fp32 with `fill` in the padding.
template <typename T>
FASTCLIP_INLINE void load_row(float* out, const T* in, int64_t width, float fill) {
  widen(out, in, width);
  for (int64_t j = width; j < round_up(width); ++j) out[j] = fill;
}

}  // namespace fastclip
