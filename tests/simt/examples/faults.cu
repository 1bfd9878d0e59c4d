// Kernels that are wrong, one fault each.
#include "device.cuh"
#include "hopper.cuh"

// Shifts by one through shared memory, with nothing between the write and the read.
__global__ void no_sync(const float* x, float* y) {
  __shared__ float s[64];
  s[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = s[(threadIdx.x + 1) % 64];
}

// Reads what nobody has written.
__global__ void unwritten(float* y) {
  float* s = fusedmlp::dynamic_shared<float>();
  if (threadIdx.x < 32) s[threadIdx.x] = 1;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}

__global__ void half_syncs(float* y) {
  if (threadIdx.x < 32) fusedmlp::named_sync(1, 64);
  y[threadIdx.x] = 1;
  if (threadIdx.x >= 32) __syncthreads();
}

__global__ void two_barriers() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void lanes_apart(int* y) {
  y[threadIdx.x] = threadIdx.x % 2 ? __shfl_sync(~0u, 1, 0) : __ballot_sync(~0u, 1);
}

__global__ void static_index(float* y, int i) {
  __shared__ float s[8];
  s[threadIdx.x] = 1;
  __syncthreads();
  y[threadIdx.x] = s[i];
}

__global__ void dynamic_index(float* y, int i, bool write) {
  float* s = fusedmlp::dynamic_shared<float>();
  s[threadIdx.x] = 1;
  if (write) s[i] = 2;
  y[threadIdx.x] = s[i];
}

__global__ void global_index(const float* x, float* y, int i, bool write) {
  if (write) {
    y[i] = 1;
  } else {
    y[threadIdx.x] = x[i];
  }
}

__global__ void endless(volatile int* flag, bool polls) {
  while (!*flag) {
    if (polls) __nanosleep(100);
  }
}

__global__ void deep(int* y, int depth) {
  volatile char frame[4096];
  frame[depth % 4096] = 1;
  if (depth) deep(y, depth - 1);
  y[0] = frame[0];
}

__global__ void traps() { __trap(); }

__global__ void static_in_cluster(int* y) {
  __shared__ int s[1];
  if (threadIdx.x == 0) s[0] = 1;
  __syncthreads();
  y[threadIdx.x] = s[0];
}

using fusedmlp::launch;

extern "C" {
int run_no_sync(const float* x, float* y) {
  return launch(no_sync, dim3(1), dim3(64), 0, nullptr, x, y);
}
int run_unwritten(float* y) {
  return launch(unwritten, dim3(1), dim3(64), 64 * sizeof(float), nullptr, y);
}
int run_half_syncs(float* y) { return launch(half_syncs, dim3(1), dim3(64), 0, nullptr, y); }
int run_two_barriers() { return launch(two_barriers, dim3(1), dim3(64), 0, nullptr); }
int run_lanes_apart(int* y) { return launch(lanes_apart, dim3(1), dim3(32), 0, nullptr, y); }
int run_static_index(float* y, int i) {
  return launch(static_index, dim3(1), dim3(8), 0, nullptr, y, i);
}
int run_dynamic_index(float* y, int i, bool write) {
  return launch(dynamic_index, dim3(1), dim3(8), 8 * sizeof(float), nullptr, y, i, write);
}
int run_global_index(const float* x, float* y, int i, bool write) {
  return launch(global_index, dim3(1), dim3(8), 0, nullptr, x, y, i, write);
}
int run_endless(int* flag, bool polls) {
  return launch(endless, dim3(1), dim3(2), 0, nullptr, flag, polls);
}
int run_deep(int* y) { return launch(deep, dim3(1), dim3(1), 0, nullptr, y, 1000); }
int run_traps() { return launch(traps, dim3(1), dim3(1), 0, nullptr); }
int run_nothing() { return launch(traps, dim3(0), dim3(1), 0, nullptr); }
int run_too_much_shared() { return launch(traps, dim3(1), dim3(1), 300000, nullptr); }
int run_static_in_cluster(int* y) {
  return fusedmlp::launch_clusters(dim3(2), static_in_cluster, dim3(2), dim3(8), 0, nullptr, y);
}
}
