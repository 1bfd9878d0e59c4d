// Blackwell's own instructions (sm_100f) under plain names: tensor memory and tcgen05, beside what
// hopper.cuh has. Without nvcc the same names come from the host runner.
#pragma once

#include "hopper.cuh"

#ifndef __CUDACC__
#include "blackwell.h"
#else

namespace fusedmlp {

// ---- tensor memory: 128 lanes of 512 columns of 32 bits; an address is lane << 16 | column --------

// By one whole warp; the address is written to shared memory.
FUSEDMLP_DEVICE void tmem_alloc(uint32_t* smem_address_out, int columns) {
  asm volatile("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%0], %1;" ::"r"(
                   shared_address(smem_address_out)),
               "r"(columns)
               : "memory");
}

FUSEDMLP_DEVICE void tmem_give_up_permit() {
  asm volatile("tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;" ::: "memory");
}

FUSEDMLP_DEVICE void tmem_free(uint32_t address, int columns) {
  asm volatile("tcgen05.dealloc.cta_group::1.sync.aligned.b32 %0, %1;" ::"r"(address), "r"(columns)
               : "memory");
}

#define FUSEDMLP_8(d, i)                                                                     \
  "=f"(d[i]), "=f"(d[i + 1]), "=f"(d[i + 2]), "=f"(d[i + 3]), "=f"(d[i + 4]), "=f"(d[i + 5]), \
      "=f"(d[i + 6]), "=f"(d[i + 7])

// Lane l of warp w takes 32 columns of lane 32 (w % 4) + l; `tmem` has the warp's first lane.
FUSEDMLP_DEVICE void tmem_load_x32(float (&d)[32], uint32_t tmem) {
  asm volatile(
      "tcgen05.ld.sync.aligned.32x32b.x32.b32 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "
      "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, "
      "%30, %31}, [%32];"
      : FUSEDMLP_8(d, 0), FUSEDMLP_8(d, 8), FUSEDMLP_8(d, 16), FUSEDMLP_8(d, 24)
      : "r"(tmem));
}

// Before what was loaded is read; `d` is named so that no read moves above.
template <int N>
FUSEDMLP_DEVICE void tmem_load_wait(float (&d)[N]) {
  asm volatile("tcgen05.wait::ld.sync.aligned;" ::: "memory");
  wgmma_result(d);
}

// ---- tcgen05.mma -------------------------------------------------------------------------------

// As Hopper's matrix_descriptor, in Blackwell's format.
FUSEDMLP_DEVICE uint64_t matrix_descriptor_sm100(const void* smem, uint32_t leading_bytes,
                                                 uint32_t stride_bytes) {
  const uint64_t address = (shared_address(smem) & 0x3ffff) >> 4;
  return address | uint64_t{leading_bytes >> 4} << 16 | uint64_t{stride_bytes >> 4} << 32 |
         uint64_t{1} << 46 | uint64_t{2} << 61;
}

// 16-bit A (K-major) and B, float32 accumulator.
template <class T>
__host__ __device__ constexpr uint32_t instruction_descriptor(int m, int n, bool b_mn_major) {
  constexpr uint32_t type = std::is_same_v<T, __nv_bfloat16> ? 1 : 0;
  return 1u << 4 | type << 7 | type << 10 | uint32_t{b_mn_major} << 16 | uint32_t(n / 8) << 17 |
         uint32_t(m / 16) << 24;
}

// d (128 x N in tensor memory) = a (128 x 16) b (16 x N) [+ d], by one thread.
FUSEDMLP_DEVICE void tcgen05_mma(uint32_t d, uint64_t a, uint64_t b, uint32_t instruction,
                                 bool accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %4, 0;\n"
      "tcgen05.mma.cta_group::1.kind::f16 [%0], %1, %2, %3, p;\n"
      "}" ::"r"(d),
      "l"(a), "l"(b), "r"(instruction), "r"(int{accumulate})
      : "memory");
}

// Arrives on the barrier once this thread's products so far are done.
FUSEDMLP_DEVICE void tcgen05_commit(uint64_t* bar) {
  asm volatile("tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%0];" ::"r"(
                   shared_address(bar))
               : "memory");
}

// In every block of the cluster that `cta_mask` names.
FUSEDMLP_DEVICE void tcgen05_commit(uint64_t* bar, uint16_t cta_mask) {
  asm volatile(
      "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.multicast::cluster.b64"
      " [%0], %1;" ::"r"(shared_address(bar)),
      "h"(cta_mask)
      : "memory");
}

// Around a barrier between tcgen05 operations of different threads.
FUSEDMLP_DEVICE void tcgen05_fence_before() {
  asm volatile("tcgen05.fence::before_thread_sync;" ::: "memory");
}

FUSEDMLP_DEVICE void tcgen05_fence_after() {
  asm volatile("tcgen05.fence::after_thread_sync;" ::: "memory");
}

}  // namespace fusedmlp

#endif
