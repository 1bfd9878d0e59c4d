// Hopper's own instructions under plain names: mbarriers, TMA, clusters, wgmma. One instruction a
// function (PTX ISA 8.0 and later); what they mean together is in gated_linear_sm90.cu. Without nvcc
// the same names come from the host runner, so that kernels run with no GPU.
#pragma once

#ifndef __CUDACC__
#include "hopper.h"
#else

#include <cstdint>
#include <type_traits>

#include "device.cuh"
#include "mma.cuh"  // ldmatrix_x4
#include "tensor_map.h"

namespace fusedmlp {

FUSEDMLP_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- mbarriers -------------------------------------------------------------------------------

FUSEDMLP_DEVICE void barrier_init(uint64_t* bar, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(arrivals));
}

// Inits become visible to the cluster and to TMA.
FUSEDMLP_DEVICE void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrive, and expect so many bytes more from TMA in this phase.
FUSEDMLP_DEVICE void barrier_expect(uint64_t* bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)),
               "r"(bytes)
               : "memory");
}

FUSEDMLP_DEVICE void barrier_arrive(uint64_t* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}

// The same barrier of another block of the cluster. Plain: .release.cluster would be a fence of the
// whole GPU, and what is handed over was read by tensor cores, not by this thread.
FUSEDMLP_DEVICE void barrier_arrive(uint64_t* bar, uint32_t cta) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(shared_address(bar)),
      "r"(cta)
      : "memory");
}

// Until the phase with that parity has completed. At a block's scope: a wider acquire would empty L1
// every time, and what other blocks bring comes by TMA.
FUSEDMLP_DEVICE void barrier_wait(uint64_t* bar, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(bar)),
      "r"(parity)
      : "memory");
}

// ---- TMA -------------------------------------------------------------------------------------

FUSEDMLP_DEVICE void prefetch(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

FUSEDMLP_DEVICE void tma_load(void* smem, const TensorMap* map, uint64_t* bar, int c0, int c1,
                              int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(smem)),
      "l"(map), "r"(shared_address(bar)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

// Into every block of the cluster that `cta_mask` names, at the same address, each with its barrier.
FUSEDMLP_DEVICE void tma_load(void* smem, const TensorMap* map, uint64_t* bar, int c0, int c1,
                              int c2, uint16_t cta_mask) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%4, %5, %6}], [%2], %3;" ::"r"(shared_address(smem)),
      "l"(map), "r"(shared_address(bar)), "h"(cta_mask), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

FUSEDMLP_DEVICE void tma_store(const TensorMap* map, const void* smem, int c0, int c1, int c2) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];"
               ::"l"(map), "r"(shared_address(smem)), "r"(c0), "r"(c1), "r"(c2)
               : "memory");
}

FUSEDMLP_DEVICE void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// All but this thread's latest N groups have been read from shared memory.
template <int N>
FUSEDMLP_DEVICE void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

template <int N>
FUSEDMLP_DEVICE void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}

// This thread's writes to shared memory become visible to TMA.
FUSEDMLP_DEVICE void fence_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- cluster, named barriers, registers -------------------------------------------------------

FUSEDMLP_DEVICE uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

FUSEDMLP_DEVICE uint32_t cluster_size() {
  uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

FUSEDMLP_DEVICE void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

FUSEDMLP_DEVICE void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

FUSEDMLP_DEVICE void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

FUSEDMLP_DEVICE void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

template <int R>
FUSEDMLP_DEVICE void registers_give() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(R));
}

template <int R>
FUSEDMLP_DEVICE void registers_take() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(R));
}

// ---- matrices --------------------------------------------------------------------------------

// Each lane gives the address of one 16-byte row; four 8x8 matrices of 16-bit elements.
FUSEDMLP_DEVICE void stmatrix_x4(void* smem, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   shared_address(smem)),
               "r"(r0), "r"(r1), "r"(r2), "r"(r3)
               : "memory");
}

// A 16-bit matrix in shared memory under the 128-byte swizzle, starting on 1024 bytes, or inside
// such a matrix. K-major: stride_bytes from 8 rows to the next 8 (leading_bytes unused). MN-major:
// leading_bytes from 64 columns to the next 64, stride_bytes from 8 steps of K to the next 8.
FUSEDMLP_DEVICE uint64_t matrix_descriptor(const void* smem, uint32_t leading_bytes,
                                           uint32_t stride_bytes) {
  const uint64_t address = (shared_address(smem) & 0x3ffff) >> 4;
  return address | uint64_t{leading_bytes >> 4} << 16 | uint64_t{stride_bytes >> 4} << 32 |
         uint64_t{1} << 62;
}

FUSEDMLP_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

FUSEDMLP_DEVICE void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int N>
FUSEDMLP_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Before the accumulators are read: without it the compiler may read them above the wait.
template <int N>
FUSEDMLP_DEVICE void wgmma_result(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define FUSEDMLP_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FUSEDMLP_16(d, i) \
  FUSEDMLP_4(d, i), FUSEDMLP_4(d, i + 4), FUSEDMLP_4(d, i + 8), FUSEDMLP_4(d, i + 12)
#define FUSEDMLP_64(d, i) \
  FUSEDMLP_16(d, i), FUSEDMLP_16(d, i + 16), FUSEDMLP_16(d, i + 32), FUSEDMLP_16(d, i + 48)
#define FUSEDMLP_REGISTERS_64                                        \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, "     \
  "%14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, "     \
  "%26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, "     \
  "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "     \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FUSEDMLP_REGISTERS_128                                       \
  FUSEDMLP_REGISTERS_64                                              \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, "   \
  "%76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, "     \
  "%88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, "     \
  "%100, %101, %102, %103, %104, %105, %106, %107, %108, %109, "     \
  "%110, %111, %112, %113, %114, %115, %116, %117, %118, %119, "     \
  "%120, %121, %122, %123, %124, %125, %126, %127"

// Operands after the accumulator: two descriptors, accumulate?, is B MN-major?
#define FUSEDMLP_WGMMA_64x128(type)                                                     \
  asm volatile(                                                                         \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                      \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                      \
      " {" FUSEDMLP_REGISTERS_64 "}, %64, %65, p, 1, 1, 0, %67;\n}"                     \
      : FUSEDMLP_64(d, 0)                                                               \
      : "l"(a), "l"(b), "r"(int{accumulate}), "n"(int{B_MN_MAJOR}))
#define FUSEDMLP_WGMMA_64x256(type)                                                     \
  asm volatile(                                                                         \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"                                     \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type                      \
      " {" FUSEDMLP_REGISTERS_128 "}, %128, %129, p, 1, 1, 0, %131;\n}"                 \
      : FUSEDMLP_64(d, 0), FUSEDMLP_64(d, 64)                                           \
      : "l"(a), "l"(b), "r"(int{accumulate}), "n"(int{B_MN_MAJOR}))

// d (64 x N) = a (64 x 16, K-major) b (16 x N) [+ d], by the 128 threads of a warp group. Thread t
// holds in d[i] row 16 (t / 32) + t % 32 / 4 + 8 (i / 2 % 2), column 8 (i / 4) + 2 (t % 4) + i % 2.
template <class T, int N, bool B_MN_MAJOR>
FUSEDMLP_DEVICE void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  constexpr bool bf16 = std::is_same_v<T, __nv_bfloat16>;
  static_assert(bf16 || std::is_same_v<T, __half>);
  static_assert(N == 128 || N == 256);
  if constexpr (N == 128 && bf16) {
    FUSEDMLP_WGMMA_64x128("bf16");
  } else if constexpr (N == 128) {
    FUSEDMLP_WGMMA_64x128("f16");
  } else if constexpr (bf16) {
    FUSEDMLP_WGMMA_64x256("bf16");
  } else {
    FUSEDMLP_WGMMA_64x256("f16");
  }
}

}  // namespace fusedmlp

#endif
