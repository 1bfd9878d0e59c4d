// C (M, N) = A (M, K) B (K, N) on the tensor cores of a warp: 32 x 32 tiles in shared memory, A and
// B row-major, a warp for each 16 x 16 part of C.
#include "device.cuh"
#include "mma.cuh"

constexpr int TILE = 32, PITCH = TILE + 8;  // elements; the pitch spreads rows over banks

template <class T>
__device__ void load_tile(T (&tile)[TILE][PITCH], const T* from, int row, int column, int rows,
                          int columns) {
  for (int i = threadIdx.x; i < TILE * TILE; i += blockDim.x) {
    const int r = row + i / TILE, c = column + i % TILE;
    tile[i / TILE][i % TILE] = r < rows && c < columns ? from[size_t(r) * columns + c] : T(0.0f);
  }
}

template <class T>
__global__ void mma_gemm(const T* a, const T* b, float* c, int M, int N, int K) {
  __shared__ __align__(16) T tile_a[TILE][PITCH];
  __shared__ __align__(16) T tile_b[TILE][PITCH];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = 16 * (warp / 2), column = 16 * (warp % 2);
  float acc[2][4] = {};
  for (int k0 = 0; k0 < K; k0 += TILE) {
    load_tile(tile_a, a, blockIdx.y * TILE, k0, M, K);
    load_tile(tile_b, b, k0, blockIdx.x * TILE, K, N);
    __syncthreads();
    for (int k = 0; k < TILE; k += 16) {
      uint32_t fa[4], fb[4];
      fusedmlp::ldmatrix_x4(fa, &tile_a[row + lane % 16][k + lane / 16 * 8]);
      fusedmlp::ldmatrix_x4_trans(fb, &tile_b[k + lane % 16][column + lane / 16 * 8]);
      const uint32_t left[2] = {fb[0], fb[1]}, right[2] = {fb[2], fb[3]};
      fusedmlp::mma_m16n8k16<T>(acc[0], fa, left);
      fusedmlp::mma_m16n8k16<T>(acc[1], fa, right);
    }
    __syncthreads();
  }
  for (int j = 0; j < 2; ++j) {
    for (int i = 0; i < 4; ++i) {
      const int r = blockIdx.y * TILE + row + lane / 4 + 8 * (i / 2);
      const int n = blockIdx.x * TILE + column + 8 * j + 2 * (lane % 4) + i % 2;
      if (r < M && n < N) c[size_t(r) * N + n] = acc[j][i];
    }
  }
}

template <class T>
int run(const void* a, const void* b, float* c, int M, int N, int K) {
  const dim3 grid((N + TILE - 1) / TILE, (M + TILE - 1) / TILE);
  return fusedmlp::launch(mma_gemm<T>, grid, dim3(128), 0, nullptr, static_cast<const T*>(a),
                          static_cast<const T*>(b), c, M, N, K);
}

extern "C" int run_mma_bf16(const void* a, const void* b, float* c, int M, int N, int K) {
  return run<__nv_bfloat16>(a, b, c, M, N, K);
}
extern "C" int run_mma_fp16(const void* a, const void* b, float* c, int M, int N, int K) {
  return run<__half>(a, b, c, M, N, K);
}
