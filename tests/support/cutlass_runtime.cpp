// A stand-in for the CUDA runtime that csrc/cutlass links: it knows kernels by name, encodes tensor maps as
// bench/gate/ptx/tensor_map.py does, and hands each launch to a hook.
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <string>

namespace {

using Hook = int (*)(const char* kernel, const unsigned* dims, size_t shared, void** arguments);
Hook hook = nullptr;

std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> kept;
  return kept;
}

// What __cudaPushCallConfiguration was told last.
dim3 pushed_blocks, pushed_threads;
size_t pushed_shared;

cudaError_t launch(const void* kernel, dim3 blocks, dim3 threads, dim3 cluster, size_t shared, void** arguments) {
  const unsigned dims[] = {cluster.x, cluster.y, cluster.z, blocks.x, blocks.y, blocks.z,
                           threads.x, threads.y, threads.z};
  const auto found = names().find(kernel);
  if (found == names().end() || hook == nullptr) return cudaErrorUnknown;
  return hook(found->second.c_str(), dims, shared, arguments) == 0 ? cudaSuccess : cudaErrorUnknown;
}

#pragma pack(push, 1)
struct Encoded {
  uint64_t magic, base, sizes[5], strides[4];
  uint32_t box[5];
  uint8_t rank, element, swizzle, nan;
};
#pragma pack(pop)

CUresult encode(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* at, const cuuint64_t* sizes,
                const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t*, CUtensorMapInterleave,
                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  Encoded made{};
  made.magic = 0x707478766D746D61;
  made.base = reinterpret_cast<uint64_t>(at);
  made.rank = static_cast<uint8_t>(rank);
  made.element = 2;
  made.swizzle = static_cast<uint8_t>(swizzle);
  for (unsigned i = 0; i < rank; ++i) {
    made.sizes[i] = sizes[i];
    made.box[i] = box[i];
    if (i > 0) made.strides[i - 1] = strides[i - 1];
  }
  std::memset(map, 0, sizeof *map);
  std::memcpy(map, &made, sizeof made);
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

void runtime_hook(Hook given) { hook = given; }

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  names()[host] = name;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}

unsigned __cudaPushCallConfiguration(dim3 blocks, dim3 threads, size_t shared, CUstream_st*) {
  pushed_blocks = blocks, pushed_threads = threads, pushed_shared = shared;
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* blocks, dim3* threads, size_t* shared, void*) {
  *blocks = pushed_blocks, *threads = pushed_threads, *shared = pushed_shared;
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 blocks, dim3 threads, void** arguments, size_t shared,
                               cudaStream_t) {
  return launch(kernel, blocks, threads, dim3(1), shared, arguments);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** arguments) {
  dim3 cluster(1);
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const auto& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) {
      cluster = dim3(attribute.val.clusterDim.x, attribute.val.clusterDim.y, attribute.val.clusterDim.z);
    }
  }
  return launch(kernel, config->gridDim, config->blockDim, cluster, config->dynamicSmemBytes, arguments);
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 0;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "the stand-in for the runtime failed"; }
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** entry, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  const bool known = std::strcmp(name, "cuTensorMapEncodeTiled") == 0;
  *entry = known ? reinterpret_cast<void*>(&encode) : nullptr;
  *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

}  // extern "C"
