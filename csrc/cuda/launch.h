// The functions of the library, but for the whole passes of block.cu. All return 0, or the number of the error of CUDA or cuBLAS. Features are float16
// (is_half) or bfloat16 in contiguous rows of `d` numbers; those called `wide` have rows that start at multiples of 16
// bytes, with zeros behind the d-th number up to `wide_d`.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

extern "C" {

// The checksum that the build gave.
uint32_t fastclip_sources();

// programs << 32 | parts, as the kernels over pairs split n rows and m columns.
int64_t fastclip_grid(int n, int m, int processors);

// row_state: (2 parts, n), column_state: (programs, m), of (max, sum); labels may be null.
int fastclip_statistics(const void* wide_image, const void* wide_text, const float* scale, const int64_t* labels,
                        float* positive, void* row_state, void* column_state, int n, int m, int wide_d, int is_half,
                        int offset, int processors, cudaStream_t stream);

// d_logits: float16, rows of `stride` numbers.
int fastclip_d_logits(const void* wide_image, const void* wide_text, const float* scale, const int64_t* labels,
                      const float* row_cosine, const float* col_cosine, const float* d_row, const float* d_col,
                      const uint32_t* bounds, void* d_logits, int n, int m, int wide_d, int is_half, int offset,
                      int stride, int processors, cudaStream_t stream);

// row_sums: (2 parts, n) of (loss, dz); weights and d_logits are both null where no gradient is wanted.
int fastclip_sigmoid(const void* wide_image, const void* wide_text, const float* scale, const float* bias,
                     const float* weights, void* row_sums, void* d_logits, int n, int m, int wide_d, int is_half,
                     int offset, int stride, int processors, cudaStream_t stream);

int fastclip_merge(const void* row_state, const void* col_state, const float* scale, float* row_max,
                   float* row_log_sum, float* col_max, float* col_log_sum, int n, int m, int row_count, int col_count,
                   cudaStream_t stream);

int fastclip_weights(const float* row_max, const float* row_log_sum, const float* d_row, const float* col_max,
                     const float* col_log_sum, const float* d_col, const float* scale, float* row_cosine,
                     float* row_weight, float* col_cosine, float* col_weight, uint32_t* bounds, int n, int m,
                     cudaStream_t stream);

int fastclip_mean(const void* row_state, const void* col_state, const float* positive, const float* scale, float* loss,
                  float* d_positive, float* row_cosine, float* row_weight, float* col_cosine, float* col_weight,
                  uint32_t* bounds, int n, int row_count, int col_count, cudaStream_t stream);

int fastclip_as_half(const void* image, const void* text, uint32_t* largest, void* image_half, void* text_half, int n,
                     int m, int d, cudaStream_t stream);

int fastclip_finish(float* grad_image, float* grad_text, const void* image, const void* text, const float* d_positive,
                    const uint32_t* bounds, const uint32_t* largest, const float* factor, float* dots, int n, int m,
                    int d, int is_half, int offset, int has_positives, cudaStream_t stream);

// loss, total (n,) = or += the sums over the parts of row_sums (count, n).
int fastclip_sum_parts(const void* row_sums, float* loss, float* total, int n, int count, int is_first,
                       cudaStream_t stream);

// out_i = a_i . b_i.
int fastclip_dots(const void* a, const void* b, float* out, int n, int d, int is_half, cudaStream_t stream);

int fastclip_scaled(const float* x, const void* a, const float* factor, void* out, float* dots, int n, int d,
                    int is_half, cudaStream_t stream);
}
