// What every .cu includes first: it compiles under nvcc for a GPU and, through tests/simt, under g++
// for the host runner.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>
#else
#include "simt.h"
#endif

#include <utility>

#ifdef __CUDACC__
#define FUSEDMLP_DEVICE __device__ __forceinline__
#else
#define FUSEDMLP_DEVICE inline
#endif

namespace fusedmlp {

// The device of the calling thread: the runtime that this extension links knows nothing of PyTorch's choice.
inline cudaError_t use_device([[maybe_unused]] int device) {
#ifdef __CUDACC__
  return cudaSetDevice(device);
#else
  return cudaSuccess;
#endif
}

// nullptr, or what went wrong.
inline const char* error_text(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
#ifdef __CUDACC__
  return cudaGetErrorString(error);
#else
  return "the host runner failed";
#endif
}

#ifdef __CUDACC__

// The dynamic shared memory of the block; it begins at a multiple of 1024 bytes.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char fusedmlp_dynamic_shared[];
  return reinterpret_cast<T*>(fusedmlp_dynamic_shared);
}

// Launches clusters of `cluster` blocks. `blocks` counts blocks, as the runtime does.
template <class... Parameters, class... Arguments>
cudaError_t launch_clusters(dim3 cluster, void (*kernel)(Parameters...), dim3 blocks, dim3 threads,
                            size_t shared_bytes, cudaStream_t stream, Arguments&&... arguments) {
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 << 10) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes));
  }
  if (error == cudaSuccess) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {cluster.x, cluster.y, cluster.z};
    cudaLaunchConfig_t config{};
    config.gridDim = blocks;
    config.blockDim = threads;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = cluster.x * cluster.y * cluster.z > 1 ? 1 : 0;
    error = cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
  }
  if (error != cudaSuccess) cudaGetLastError();  // the caller has it; none stays behind
  return error;
}

#else

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(simt::self().block->shared->data());
}

template <class... Parameters, class... Arguments>
cudaError_t launch_clusters(dim3 cluster, void (*kernel)(Parameters...), dim3 blocks, dim3 threads,
                            size_t shared_bytes, cudaStream_t, Arguments&&... arguments) {
  return simt::launch(cluster, kernel, blocks, threads, shared_bytes,
                      std::forward<Arguments>(arguments)...);
}

#endif

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, size_t shared_bytes,
                   cudaStream_t stream, Arguments&&... arguments) {
  return launch_clusters(dim3(1), kernel, blocks, threads, shared_bytes, stream,
                         std::forward<Arguments>(arguments)...);
}

}  // namespace fusedmlp
