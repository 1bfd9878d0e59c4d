// One primitive a kernel, for its results to be compared with what its documentation says.
#include "device.cuh"
#include "hopper.cuh"

using fusedmlp::launch;

// A row of results for each lane: shuffles of the lane's number, votes, matches and sums.
__global__ void warp_pieces(int* out, int width, int by) {
  const int lane = threadIdx.x;
  int* row = out + lane * 10;
  row[0] = __shfl_sync(~0u, lane, by, width);
  row[1] = __shfl_xor_sync(~0u, lane, by, width);
  row[2] = __shfl_up_sync(~0u, lane, by, width);
  row[3] = __shfl_down_sync(~0u, lane, by, width);
  row[4] = __ballot_sync(~0u, lane % 3 == 0);
  row[5] = __any_sync(~0u, lane == 7) + 2 * __all_sync(~0u, lane >= 0) + 4 * __all_sync(~0u, lane);
  row[6] = __match_any_sync(~0u, lane % 5);
  row[7] = __reduce_add_sync(~0u, lane);
  // The two halves of the warp apart.
  row[8] = lane < 16 ? __shfl_sync(0xffffu, lane, 3) : __shfl_sync(0xffff0000u, lane, 20);
  if (lane >= 8) return;
  row[9] = __shfl_sync(0xffu, lane, 7);
}

__global__ void bit_pieces(unsigned* out, unsigned x, unsigned y) {
  out[0] = __popc(x);
  out[1] = __clz(x);
  out[2] = __ffs(x);
  out[3] = __brev(x);
  out[4] = __byte_perm(x, y, 0x7250);
  out[5] = __funnelshift_l(x, y, 12);
  out[6] = __funnelshift_r(x, y, 12);
  out[7] = __umulhi(x, y);
}

// A box from `from` to `to` through shared memory.
__global__ void copy_box(const __grid_constant__ fusedmlp::TensorMap from,
                         const __grid_constant__ fusedmlp::TensorMap to, int3 at, int3 there,
                         int bytes, uint16_t* seen) {
  unsigned char* box = fusedmlp::dynamic_shared<unsigned char>();
  __shared__ uint64_t bar;
  if (threadIdx.x == 0) {
    fusedmlp::barrier_init(&bar, 1);
    fusedmlp::barrier_init_fence();
    fusedmlp::barrier_expect(&bar, bytes);
    fusedmlp::tma_load(box, &from, &bar, at.x, at.y, at.z);
  }
  __syncthreads();
  fusedmlp::barrier_wait(&bar, 0);
  for (int i = threadIdx.x; i < bytes / 2; i += blockDim.x) {
    seen[i] = reinterpret_cast<const uint16_t*>(box)[i];
  }
  fusedmlp::fence_async_shared();
  __syncthreads();
  if (threadIdx.x == 0) {
    fusedmlp::tma_store(&to, box, there.x, there.y, there.z);
    fusedmlp::tma_store_commit();
    fusedmlp::tma_store_wait<0>();
  }
}

extern "C" {
int run_warp_pieces(int* out, int width, int by) {
  return launch(warp_pieces, dim3(1), dim3(32), 0, nullptr, out, width, by);
}
int run_bit_pieces(unsigned* out, unsigned x, unsigned y) {
  return launch(bit_pieces, dim3(1), dim3(1), 0, nullptr, out, x, y);
}
int run_copy_box(const void* from, void* to, uint16_t* seen, int s0, int s1, int s2, int b0, int b1,
                 int b2, int x, int y, int z, int tx, int ty, int tz, bool swizzle) {
  const uint64_t size[] = {uint64_t(s0), uint64_t(s1), uint64_t(s2)};
  const uint64_t stride[] = {uint64_t(s0), uint64_t(s0) * s1};
  const uint32_t box[] = {uint32_t(b0), uint32_t(b1), uint32_t(b2)};
  fusedmlp::TensorMap maps[2];
  if (fusedmlp::encode_tensor_map(&maps[0], from, size, stride, box, swizzle) ||
      fusedmlp::encode_tensor_map(&maps[1], to, size, stride, box, swizzle)) {
    return cudaErrorInvalidValue;
  }
  const int bytes = 2 * b0 * b1 * b2;
  return launch(copy_box, dim3(1), dim3(32), bytes, nullptr, maps[0], maps[1], make_int3(x, y, z),
                make_int3(tx, ty, tz), bytes, seen);
}
}
