// cuTensorMapEncodeTiled, found through the runtime: the extension must load where no driver is.
#include "tensor_map.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

namespace fusedmlp {

namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode find_encode() {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                                             cudaEnableDefault, &found);
  if (error != cudaSuccess) cudaGetLastError();  // leave nothing behind for the next caller
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess
             ? reinterpret_cast<Encode>(entry)
             : nullptr;
}

// Drivers may make a map of Blackwell wrongly, so that TMA sporadically reads what is not there, where
// the memory has less than 128 KB and is not dense; bit 85 then has to be cleared. NVIDIA says so under
// "Known issues" in the release notes of driver 595.71.05 and 595.91.07, which are of CUDA 13.2.
// CUTLASS (b7ecaa6) and Triton from 3.7 on do it up to CUDA 13.1; triton-lang/triton#11011 met the fault
// with drivers of 13.2 and 13.3 as well.
constexpr int kFaultyDrivers = 13030;
constexpr uint64_t kSmall = 128 << 10;
constexpr uint64_t kWindowOf128KB = uint64_t(1) << 21;  // of the second word

bool is_faulty(const uint64_t size[3], const uint64_t stride[2]) {
  static const int driver = [] {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
  }();
  const uint64_t last = size[0] - 1 + (size[1] - 1) * stride[0] + (size[2] - 1) * stride[1];
  const bool dense = stride[0] == size[0] && stride[1] == size[0] * size[1];
  return driver <= kFaultyDrivers && 2 * (last + 1) < kSmall && !dense;
}

}  // namespace

int encode_tensor_map(TensorMap* map, const void* base, const uint64_t size[3],
                       const uint64_t stride[2], const uint32_t box[3], bool swizzle,
                       bool blackwell) {
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap));
  static const Encode encode = find_encode();
  if (encode == nullptr) return -1;
  const cuuint64_t sizes[] = {size[0], size[1], size[2]};
  const cuuint64_t stride_bytes[] = {2 * stride[0], 2 * stride[1]};
  const cuuint32_t boxes[] = {box[0], box[1], box[2]}, steps[] = {1, 1, 1};
  CUtensorMap* made = reinterpret_cast<CUtensorMap*>(map);
  // The element type decides nothing but its size: no arithmetic is done on the way.
  const CUresult error = encode(
      made, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<void*>(base), sizes, stride_bytes, boxes,
      steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      swizzle ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (error == CUDA_SUCCESS && blackwell && is_faulty(size, stride)) {
    made->opaque[1] &= ~kWindowOf128KB;
  }
  return error;
}

}  // namespace fusedmlp
