// GELU, its tanh approximation and QuickGELU, of x + bias, in one pass each way; backward sums the bias's gradient in the same.
//
//   y = z g(z), dy/dz = g(z) + z g'(z), with z = x + bias and g the normal distribution function, or a logistic function
//
// The distribution function is formula 7.1.26 of Abramowitz and Stegun (error 1.5e-7), which takes the exponential that its own
// derivative needs.
#include "rows.h"

namespace fastclip {
namespace {

enum class Kind { gelu, gelu_tanh, quick_gelu };

struct Gate {
  Vec value, slope;
};

FASTCLIP_INLINE Gate logistic(Vec v, Vec slope) {
  const Vec e = exponential(-v), s = 1.f / (1.f + e);
  return {s, s * (s * e) * slope};  // s e is 1 - s without its cancellation
}

template <Kind kind>
FASTCLIP_INLINE Gate gate(Vec z) {
  if constexpr (kind == Kind::quick_gelu) return logistic(1.702f * z, splat(1.702f));
  if constexpr (kind == Kind::gelu_tanh) {
    constexpr float twice = 1.5957691216f, cubic = 0.044715f;  // 2 sqrt(2 / pi)
    return logistic(twice * (z + cubic * z * z * z), twice * (1.f + 3.f * cubic * z * z));
  }
  const Vec size = z < 0.f ? -z : z;
  const Vec bell = exponential(-0.5f * z * z);
  const Vec t = 1.f / (1.f + 0.2316418882f * size);  // 0.3275911 / sqrt(2)
  Vec tail = splat(0.5307027145f);                   // half of the formula's coefficients
  tail = tail * t - 0.7265760135f;
  tail = tail * t + 0.7107068705f;
  tail = tail * t - 0.142248368f;
  tail = tail * t + 0.1274147960f;
  tail = tail * t * bell;
  return {z < 0.f ? tail : 1.f - tail, 0.3989422804f * bell};
}

template <Kind kind, typename T>
FASTCLIP_INLINE void forward_rows(T* out, const T* x, const float* bias, int64_t rows, int64_t width, float* z) {
  for (int64_t i = 0; i < rows; ++i) {
    load_row(z, x + i * width, width, 0.f);
    for (int64_t j = 0; j < width; j += kLanes) {
      const Vec v = load(z + j) + load(bias + j);
      store(z + j, v * gate<kind>(v).value);
    }
    narrow(out + i * width, z, width);
  }
}

// d_bias (round_up(width)) is added to.
template <Kind kind, typename T>
FASTCLIP_INLINE void backward_rows(T* d_x, const T* d_out, const T* x, const float* bias, float* d_bias, int64_t rows, int64_t width, float* z) {
  float* d = z + round_up(width);
  for (int64_t i = 0; i < rows; ++i) {
    load_row(z, x + i * width, width, 0.f);
    load_row(d, d_out + i * width, width, 0.f);
    for (int64_t j = 0; j < width; j += kLanes) {
      const Vec v = load(z + j) + load(bias + j);
      const Gate g = gate<kind>(v);
      const Vec grad = load(d + j) * (g.value + v * g.slope);
      store(d + j, grad);
      store(d_bias + j, load(d_bias + j) + grad);
    }
    narrow(d_x + i * width, d, width);
  }
}

#define FASTCLIP_ACTIVATION(kind, T, suffix)                                                                                            \
  FASTCLIP_MULTIVERSION void forward_##kind##suffix(T* out, const T* x, const float* bias, int64_t rows, int64_t width, float* z) {     \
    forward_rows<Kind::kind>(out, x, bias, rows, width, z);                                                                             \
  }                                                                                                                                     \
  FASTCLIP_MULTIVERSION void backward_##kind##suffix(T* d_x, const T* d_out, const T* x, const float* bias, float* d_bias, int64_t rows, \
                                                     int64_t width, float* z) {                                                         \
    backward_rows<Kind::kind>(d_x, d_out, x, bias, d_bias, rows, width, z);                                                             \
  }
FASTCLIP_ACTIVATION(gelu, float, _fp32)
FASTCLIP_ACTIVATION(gelu_tanh, float, _fp32)
FASTCLIP_ACTIVATION(quick_gelu, float, _fp32)
FASTCLIP_ACTIVATION(gelu, at::BFloat16, _bf16)
FASTCLIP_ACTIVATION(gelu_tanh, at::BFloat16, _bf16)
FASTCLIP_ACTIVATION(quick_gelu, at::BFloat16, _bf16)
#undef FASTCLIP_ACTIVATION

template <typename T>
using Forward = void (*)(T*, const T*, const float*, int64_t, int64_t, float*);
template <typename T>
using Backward = void (*)(T*, const T*, const T*, const float*, float*, int64_t, int64_t, float*);

Kind kind_of(c10::string_view name) {
  TORCH_CHECK_VALUE(name == "gelu" || name == "gelu_tanh" || name == "quick_gelu", "kind must be gelu, gelu_tanh or quick_gelu");
  return name == "gelu" ? Kind::gelu : name == "gelu_tanh" ? Kind::gelu_tanh : Kind::quick_gelu;
}

template <typename T>
void forward(const at::Tensor& out, const at::Tensor& x, const std::vector<float>& bias, Forward<T> run) {
  const int64_t width = x.size(-1), rows = width ? x.numel() / width : 0;
  auto* to = static_cast<T*>(out.data_ptr());
  const auto* from = static_cast<const T*>(x.const_data_ptr());
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width)), [&](int64_t begin, int64_t end) {
    std::vector<float> z(bias.size());
    run(to + begin * width, from + begin * width, bias.data(), end - begin, width, z.data());
  });
}

template <typename T>
void backward(const at::Tensor& d_x, const at::Tensor& partial, const at::Tensor& d_out, const at::Tensor& x, const std::vector<float>& bias,
              const RowBlocks& blocks, Backward<T> run) {
  const int64_t width = x.size(-1), rows = width ? x.numel() / width : 0, padded = static_cast<int64_t>(bias.size());
  auto* to = static_cast<T*>(d_x.data_ptr());
  const auto *grad = static_cast<const T*>(d_out.const_data_ptr()), *from = static_cast<const T*>(x.const_data_ptr());
  auto* sums = partial.data_ptr<float>();
  at::parallel_for(0, blocks.count, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> z(2 * padded);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * blocks.size, at = first * width;
      run(to + at, grad + at, from + at, bias.data(), sums + block * padded, std::min(blocks.size, rows - first), width, z.data());
    }
  });
}

}  // namespace

at::Tensor activation_fwd(const at::Tensor& x_, const std::optional<at::Tensor>& bias, c10::string_view kind) {
  const auto x = x_.contiguous();
  auto out = x.new_empty(x.sizes());
  const auto shift = columns(bias, x.size(-1), 0.f);
  const auto k = kind_of(kind);
  if (x.scalar_type() == at::kBFloat16)
    forward<at::BFloat16>(out, x, shift,
                          k == Kind::gelu ? forward_gelu_bf16 : k == Kind::gelu_tanh ? forward_gelu_tanh_bf16 : forward_quick_gelu_bf16);
  else
    forward<float>(out, x, shift, k == Kind::gelu ? forward_gelu_fp32 : k == Kind::gelu_tanh ? forward_gelu_tanh_fp32 : forward_quick_gelu_fp32);
  return out;
}

// The gradients for x and for the bias, the second in fp32.
std::tuple<at::Tensor, at::Tensor> activation_bwd(const at::Tensor& d_out_, const at::Tensor& x_, const std::optional<at::Tensor>& bias,
                                                  c10::string_view kind) {
  const auto x = x_.contiguous(), d_out = d_out_.contiguous();
  auto d_x = x.new_empty(x.sizes());
  const int64_t width = x.size(-1), rows = width ? x.numel() / width : 0;
  const auto shift = columns(bias, width, 0.f);
  const RowBlocks blocks(rows);
  const auto partial = x.new_zeros({blocks.count, static_cast<int64_t>(shift.size())}, at::kFloat);
  const auto k = kind_of(kind);
  if (x.scalar_type() == at::kBFloat16)
    backward<at::BFloat16>(d_x, partial, d_out, x, shift, blocks,
                           k == Kind::gelu ? backward_gelu_bf16 : k == Kind::gelu_tanh ? backward_gelu_tanh_bf16 : backward_quick_gelu_bf16);
  else
    backward<float>(d_x, partial, d_out, x, shift, blocks,
                    k == Kind::gelu ? backward_gelu_fp32 : k == Kind::gelu_tanh ? backward_gelu_tanh_fp32 : backward_quick_gelu_fp32);
  return {d_x, partial.sum(0).narrow(0, 0, width).contiguous()};
}

}  // namespace fastclip
