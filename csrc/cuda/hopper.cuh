// Hopper's own instructions: bulk tensor copies (TMA), the barriers they complete on, and warpgroup products (wgmma).
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

namespace fastclip {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- barriers

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}

__device__ __forceinline__ void barrier_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Until the phase of that parity is over; a new barrier counts as one whose phase of parity 1 is over.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// The same barrier of all programs of the cluster, of `count` of them.
__device__ __forceinline__ void barrier_arrive_all(uint64_t* barrier, int count) {
  for (int program = 0; program < count; program++) {
    asm volatile(
        "{\n"
        ".reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
        "}\n" ::"r"(shared_address(barrier)),
        "r"(program)
        : "memory");
  }
}

// Of all threads of all programs of the cluster.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Of the 128 threads of one warpgroup.
__device__ __forceinline__ void warpgroup_sync(int warpgroup) {
  asm volatile("bar.sync %0, 128;" ::"r"(warpgroup + 1) : "memory");
}

// ---- bulk tensor copies: a box of a matrix, (row, column) its first element

__device__ __forceinline__ void load_box(void* box, const CUtensorMap* map, int row, int column, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          shared_address(box)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

// To the same place in all programs of the cluster that `programs` has a bit of, and their barriers.
__device__ __forceinline__ void load_box_to(void* box, const CUtensorMap* map, int row, int column, uint64_t* barrier,
                                            uint16_t programs) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, "
      "{%2, %3}], [%4], %5;" ::"r"(shared_address(box)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"(programs)
      : "memory");
}

__device__ __forceinline__ void store_box(const void* box, const CUtensorMap* map, int row, int column) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map),
               "r"(column), "r"(row), "r"(shared_address(box))
               : "memory");
}

__device__ __forceinline__ void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until the boxes stored by this thread may be overwritten.
__device__ __forceinline__ void wait_stores_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

__device__ __forceinline__ void wait_stores() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// What ordinary stores wrote to shared memory becomes visible to the copies.
__device__ __forceinline__ void fence_before_copy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- products

// Of a box with rows of 128 bytes in the 128-byte swizzle, which repeats after 8 rows; 32 bytes along a row are 2 more.
__device__ __forceinline__ uint64_t box_descriptor(const void* box) {
  const uint64_t start = (shared_address(box) & 0x3FFFF) >> 4;
  return start | (1ull << 16) | (64ull << 32) | (1ull << 62);
}

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

#define FASTCLIP_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FASTCLIP_D16(i) FASTCLIP_D4(i), FASTCLIP_D4(i + 4), FASTCLIP_D4(i + 8), FASTCLIP_D4(i + 12)
#define FASTCLIP_PRODUCT(TYPE)                                                                                        \
  asm volatile(                                                                                                       \
      "{\n"                                                                                                           \
      ".reg .pred keep;\n"                                                                                            \
      "setp.ne.b32 keep, %66, 0;\n"                                                                                   \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE                                                    \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "   \
      "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44," \
      " %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, "   \
      "keep, 1, 1, 0, 0;\n"                                                                                           \
      "}\n"                                                                                                           \
      : FASTCLIP_D16(0), FASTCLIP_D16(16), FASTCLIP_D16(32), FASTCLIP_D16(48)                                         \
      : "l"(a), "l"(b), "r"(keep))

// d (64, 128) = a (64, 16) b (128, 16)^T, added to d where `keep`. A thread's d: row lane / 4 (+ 8 for the third and
// fourth of four) of its warp's 16, columns 8 j + 2 (lane % 4) and one more in d[4 j ...].
template <typename T>
__device__ __forceinline__ void product(float (&d)[64], uint64_t a, uint64_t b, int keep);

template <>
__device__ __forceinline__ void product<__half>(float (&d)[64], uint64_t a, uint64_t b, int keep) {
  FASTCLIP_PRODUCT("f16");
}

template <>
__device__ __forceinline__ void product<__nv_bfloat16>(float (&d)[64], uint64_t a, uint64_t b, int keep) {
  FASTCLIP_PRODUCT("bf16");
}

// ---- registers and arithmetic

template <int COUNT>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ uint32_t two_halves(float a, float b) {
  const __half2 both = __floats2half2_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&both);
}

// Four 8 x 8 matrices of 16 bits, in the layout of a product's result; each lane has the address of one row.
__device__ __forceinline__ void store_matrices(uint32_t row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}

// ---- on the host

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's function, without linking to the driver; null where there is none.
inline EncodeTiled encode_tiled() {
  static const EncodeTiled found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult status;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &status) !=
        cudaSuccess) {
      function = nullptr;
    }
    return reinterpret_cast<EncodeTiled>(function);
  }();
  return found;
}

// A matrix of 16-bit numbers as boxes of `box_rows` rows and 64 columns; whether that could be said.
inline bool make_map(CUtensorMap* map, const void* matrix, bool is_half, int64_t rows, int64_t columns, int64_t stride,
                     int box_rows) {
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride) * 2};
  const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
  const auto type = is_half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const EncodeTiled encode = encode_tiled();
  return encode != nullptr &&
         encode(map, type, 2, const_cast<void*>(matrix), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace fastclip
