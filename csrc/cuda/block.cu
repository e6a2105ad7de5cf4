// Whole passes of the blocks, launch after launch, so that a small batch does not wait for Python.
#include "launch.h"

namespace {

// cublasGemmEx, whose header need not be there; the caller has the address and a handle for the stream.
using Gemm = int (*)(void* handle, int trans_a, int trans_b, int m, int n, int k, const void* alpha, const void* a,
                     int a_type, int lda, const void* b, int b_type, int ldb, const void* beta, void* c, int c_type,
                     int ldc, int compute_type, int algorithm);
constexpr int AS_IT_IS = 0, TRANSPOSED = 1, REAL_16F = 2, REAL_32F = 0, COMPUTE_32F = 68, DEFAULT = -1;

struct Products {
  void* handle;
  Gemm gemm;

  // out (rows, d) = or += x (rows, k) y (k, d), or x^T y of x (k, rows); float16 to float32; x has rows of `stride`.
  int run(float* out, const char* x, const char* y, int rows, int k, int d, int stride, bool transposed,
          bool is_first) const {
    const float one = 1, beta = is_first ? 0 : 1;  // cuBLAS counts columns first: out^T = y^T x^T
    return gemm(handle, AS_IT_IS, transposed ? TRANSPOSED : AS_IT_IS, d, rows, k, &one, y, REAL_16F, d, x, REAL_16F,
                stride, &beta, out, REAL_32F, d, COMPUTE_32F, DEFAULT);
  }
};

const char* row_of(const void* x, int64_t row, int64_t width) { return static_cast<const char*>(x) + 2 * row * width; }

int smaller(int a, int b) { return a < b ? a : b; }

#define FASTCLIP_TRY(call)           \
  do {                               \
    const int status = (call);       \
    if (status != 0) return status;  \
  } while (0)

}  // namespace

extern "C" {

uint32_t fastclip_sources() { return FASTCLIP_SOURCES; }

// dz @ text and dz^T @ image, with the positives' part where there are no labels; in chunks of dz, whose float16 fill
// `scratch`, (chunk_rows, chunk_cols) at most. left and right: the features as float16; largest: by `fastclip_as_half`,
// null for float16 features. factor and dots as `fastclip_finish` takes them.
int fastclip_gradients(const void* image, const void* text, const void* wide_image, const void* wide_text,
                       const void* left, const void* right, const float* scale, const int64_t* labels,
                       const float* row_cosine, const float* col_cosine, const float* d_row, const float* d_col,
                       const float* d_positive, const uint32_t* bounds, const uint32_t* largest, void* scratch,
                       float* grad_image, float* grad_text, const float* factor, float* dots, void* blas_handle,
                       void* gemm, int n, int m, int d, int wide_d, int is_half, int offset, int chunk_rows,
                       int chunk_cols, int processors, cudaStream_t stream) {
  const Products products{blas_handle, reinterpret_cast<Gemm>(gemm)};
  const int stride = (smaller(m, chunk_cols) + 7) / 8 * 8;  // rows start as bulk copies need it
  const char* d_logits = static_cast<const char*>(scratch);
  for (int i = 0; i < n; i += chunk_rows) {
    const int rows = smaller(chunk_rows, n - i);
    for (int j = 0; j < m; j += chunk_cols) {
      const int cols = smaller(chunk_cols, m - j);
      const int shift = labels == nullptr ? offset + i - j : -j;
      FASTCLIP_TRY(fastclip_d_logits(row_of(wide_image, i, wide_d), row_of(wide_text, j, wide_d), scale,
                                     labels == nullptr ? nullptr : labels + i, row_cosine + i, col_cosine + j,
                                     d_row + i, d_col + j, bounds, scratch, rows, cols, wide_d, is_half, shift, stride,
                                     processors, stream));
      FASTCLIP_TRY(products.run(grad_image + static_cast<int64_t>(i) * d, d_logits, row_of(right, j, d), rows, cols, d,
                                stride, false, j == 0));
      FASTCLIP_TRY(products.run(grad_text + static_cast<int64_t>(j) * d, d_logits, row_of(left, i, d), cols, rows, d,
                                stride, true, i == 0));
    }
  }
  return fastclip_finish(grad_image, grad_text, image, text, d_positive, bounds, largest, factor, dots, n, m, d,
                         is_half, offset, labels == nullptr, stream);
}

// What `fastclip_contrastive_mean` needs beside its results, in bytes.
int64_t fastclip_contrastive_mean_bytes(int n, int d, int is_half, int chunk_rows, int chunk_cols, int processors) {
  const int64_t grid = fastclip_grid(n, n, processors), programs = grid >> 32, parts = grid & 0xffffffff;
  const int64_t chunk = static_cast<int64_t>(smaller(n, chunk_rows)) * ((smaller(n, chunk_cols) + 7) / 8 * 8);
  return 8 * n * (2 * parts + programs) + 4 * 6 * static_cast<int64_t>(n) + (is_half ? 0 : 4 * static_cast<int64_t>(n) * d) +
         2 * chunk + 16 * 256;
}

// The losses (n,) of n pairs, whose mean is the loss, its gradient for the features, and dots (n,), whose sum is that
// for the scale.
int fastclip_contrastive_mean(const void* image, const void* text, const void* wide_image, const void* wide_text,
                              const float* scale, float* loss, float* grad_image, float* grad_text, float* dots,
                              void* workspace, void* blas_handle, void* gemm, int n, int d, int wide_d, int is_half,
                              int chunk_rows, int chunk_cols, int processors, cudaStream_t stream) {
  char* free = static_cast<char*>(workspace);
  const auto take = [&](int64_t bytes) {
    char* taken = free;
    free += (bytes + 255) / 256 * 256;
    return taken;
  };
  const auto numbers = [&] { return reinterpret_cast<float*>(take(4 * static_cast<int64_t>(n))); };
  const int64_t grid = fastclip_grid(n, n, processors), programs = grid >> 32, parts = grid & 0xffffffff;
  auto* bounds = reinterpret_cast<uint32_t*>(take(5 * sizeof(uint32_t)));
  uint32_t* largest = bounds + 3;
  void *row_state = take(8 * n * 2 * parts), *col_state = take(8 * n * programs);
  float *positive = numbers(), *d_positive = numbers(), *row_cosine = numbers(), *col_cosine = numbers();
  float *d_row = numbers(), *d_col = numbers();
  FASTCLIP_TRY(cudaMemsetAsync(bounds, 0, 5 * sizeof(uint32_t), stream));
  FASTCLIP_TRY(fastclip_statistics(wide_image, wide_text, scale, nullptr, positive, row_state, col_state, n, n, wide_d,
                                   is_half, 0, processors, stream));
  FASTCLIP_TRY(fastclip_mean(row_state, col_state, positive, scale, loss, d_positive, row_cosine, d_row, col_cosine,
                             d_col, bounds, n, 2 * parts, programs, stream));
  const void *left = image, *right = text;
  if (!is_half) {
    void *image_half = take(2 * static_cast<int64_t>(n) * d), *text_half = take(2 * static_cast<int64_t>(n) * d);
    FASTCLIP_TRY(fastclip_as_half(image, text, largest, image_half, text_half, n, n, d, stream));
    left = image_half, right = text_half;
  }
  return fastclip_gradients(image, text, wide_image, wide_text, left, right, scale, nullptr, row_cosine, col_cosine,
                            d_row, d_col, d_positive, bounds, is_half ? nullptr : largest, free, grad_image, grad_text,
                            scale, dots, blas_handle, gemm, n, n, d, wide_d, is_half, 0, chunk_rows, chunk_cols,
                            processors, stream);
}

// The losses and row sums of dz (n,) of the sigmoid block, and the gradient of sum_i weights_i loss_i with the own
// pairs' part, d_own (n,), times the scale; dots (n,), whose sum is the gradient for the scale. weights are times 2^14 /
// their largest, which bounds has; row_sums: room for those of a chunk, the rest as `fastclip_gradients`.
int fastclip_sigmoid_gradients(const void* image, const void* text, const void* wide_image, const void* wide_text,
                               const void* left, const void* right, const float* scale, const float* bias,
                               const float* weights, const float* d_own, const uint32_t* bounds,
                               const uint32_t* largest, void* row_sums, void* scratch, float* loss, float* total,
                               float* grad_image, float* grad_text, float* dots, void* blas_handle, void* gemm, int n,
                               int m, int d, int wide_d, int is_half, int offset, int chunk_rows, int chunk_cols,
                               int processors, cudaStream_t stream) {
  const Products products{blas_handle, reinterpret_cast<Gemm>(gemm)};
  const int stride = (smaller(m, chunk_cols) + 7) / 8 * 8;
  const char* d_logits = static_cast<const char*>(scratch);
  for (int i = 0; i < n; i += chunk_rows) {
    const int rows = smaller(chunk_rows, n - i);
    for (int j = 0; j < m; j += chunk_cols) {
      const int cols = smaller(chunk_cols, m - j);
      FASTCLIP_TRY(fastclip_sigmoid(row_of(wide_image, i, wide_d), row_of(wide_text, j, wide_d), scale, bias,
                                    weights + i, row_sums, scratch, rows, cols, wide_d, is_half, offset + i - j,
                                    stride, processors, stream));
      const int count = 2 * static_cast<int>(fastclip_grid(rows, cols, processors) & 0xffffffff);
      FASTCLIP_TRY(fastclip_sum_parts(row_sums, loss + i, total + i, rows, count, j == 0, stream));
      FASTCLIP_TRY(products.run(grad_image + static_cast<int64_t>(i) * d, d_logits, row_of(right, j, d), rows, cols,
                                d, stride, false, j == 0));
      FASTCLIP_TRY(products.run(grad_text + static_cast<int64_t>(j) * d, d_logits, row_of(left, i, d), cols, rows, d,
                                stride, true, i == 0));
    }
  }
  return fastclip_finish(grad_image, grad_text, image, text, d_own, bounds, largest, scale, dots, n, m, d, is_half,
                         offset, true, stream);
}
}
