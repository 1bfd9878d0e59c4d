// Sums of rows by votes and shared memory, a histogram by atomics, a copy through cp.async, and a
// producer and consumers at named barriers.
#include "device.cuh"
#include "hopper.cuh"

using fusedmlp::named_arrive;
using fusedmlp::named_sync;

__global__ void block_sum(const float* x, float* sums, int* positive, int columns) {
  float* part = fusedmlp::dynamic_shared<float>();
  const float* row = x + size_t(blockIdx.x) * columns;
  float sum = 0;
  int count = 0;
  for (int first = 0; first < columns; first += blockDim.x) {
    const int k = first + threadIdx.x;
    const float value = k < columns ? row[k] : 0;
    sum += value;
    count += __syncthreads_count(value > 0);
  }
  part[threadIdx.x] = sum;
  __syncthreads();
  for (unsigned n = blockDim.x / 2; n; n /= 2) {
    if (threadIdx.x < n) part[threadIdx.x] += part[threadIdx.x + n];
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    sums[blockIdx.x] = part[0];
    positive[blockIdx.x] = count;
  }
}

extern "C" int run_block_sum(const float* x, float* sums, int* positive, int rows, int columns) {
  return fusedmlp::launch(block_sum, dim3(rows), dim3(128), 128 * sizeof(float), nullptr, x, sums,
                          positive, columns);
}

__global__ void histogram(const int* values, int* counts, int n, int bins) {
  int* mine = fusedmlp::dynamic_shared<int>();
  for (int i = threadIdx.x; i < bins; i += blockDim.x) mine[i] = 0;
  __syncthreads();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    atomicAdd(&mine[values[i]], 1);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < bins; i += blockDim.x) atomicAdd(&counts[i], mine[i]);
}

extern "C" int run_histogram(const int* values, int* counts, int n, int bins) {
  return fusedmlp::launch(histogram, dim3(3), dim3(96), bins * sizeof(int), nullptr, values, counts,
                          n, bins);
}

// y = x + 1, in tiles of four floats a thread, two tiles ahead.
template <bool WAITS>
__global__ void pipeline(const float4* x, float4* y, int tiles) {
  __shared__ float4 stages[3][64];
  const auto fetch = [&](int tile) {
    if (tile < tiles) {
      __pipeline_memcpy_async(&stages[tile % 3][threadIdx.x], x + tile * 64 + threadIdx.x, 16);
    }
    __pipeline_commit();
  };
  fetch(0);
  fetch(1);
  for (int tile = 0; tile < tiles; ++tile) {
    fetch(tile + 2);
    if (WAITS) __pipeline_wait_prior(2);
    const float4 v = stages[tile % 3][threadIdx.x];
    y[tile * 64 + threadIdx.x] = make_float4(v.x + 1, v.y + 1, v.z + 1, v.w + 1);
  }
  __pipeline_wait_prior(0);
}

extern "C" int run_pipeline(const float4* x, float4* y, int tiles, int waits) {
  return fusedmlp::launch(waits ? pipeline<true> : pipeline<false>, dim3(1), dim3(64), 0, nullptr,
                          x, y, tiles);
}

// One warp fills a slot, three sum it; full and empty are named barriers.
__global__ void produce(const float* x, float* sums, int tiles) {
  __shared__ float slot[32];
  constexpr int FULL = 1, EMPTY = 2, THREADS = 128;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float sum = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    if (warp == 0) {
      if (tile) named_sync(EMPTY, THREADS);
      slot[lane] = x[tile * 32 + lane];
      named_arrive(FULL, THREADS);
    } else {
      named_sync(FULL, THREADS);
      for (int i = 0; i < 32; ++i) sum += slot[i];
      if (tile + 1 < tiles) named_arrive(EMPTY, THREADS);
    }
  }
  if (warp && lane == 0) sums[warp - 1] = sum;
}

extern "C" int run_produce(const float* x, float* sums, int tiles) {
  return fusedmlp::launch(produce, dim3(1), dim3(128), 0, nullptr, x, sums, tiles);
}
