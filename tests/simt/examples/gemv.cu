// y = W x: a block per row, partial sums by shuffles and by shared memory.
#include "device.cuh"

using bf16 = __nv_bfloat16;

__global__ void gemv(const bf16* w, const bf16* x, float* y, int columns) {
  __shared__ float parts[8];
  const bf16* row = w + size_t(blockIdx.x) * columns;
  float sum = 0;
  for (int k = threadIdx.x; k < columns; k += blockDim.x) {
    sum += __bfloat162float(row[k]) * __bfloat162float(x[k]);
  }
  for (int m = 16; m; m /= 2) sum += __shfl_xor_sync(~0u, sum, m);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0;
    for (unsigned i = 0; i < blockDim.x / 32; ++i) total += parts[i];
    y[blockIdx.x] = total;
  }
}

extern "C" int run_gemv(const void* w, const void* x, float* y, int rows, int columns) {
  return fusedmlp::launch(gemv, dim3(rows), dim3(256), 0, nullptr, static_cast<const bf16*>(w),
                          static_cast<const bf16*>(x), y, columns);
}
