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

}  // namespace

int encode_tensor_map(TensorMap* map, const void* base, const uint64_t size[3],
                       const uint64_t stride[2], const uint32_t box[3], bool swizzle) {
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap));
  static const Encode encode = find_encode();
  if (encode == nullptr) return -1;
  const cuuint64_t sizes[] = {size[0], size[1], size[2]};
  const cuuint64_t stride_bytes[] = {2 * stride[0], 2 * stride[1]};
  const cuuint32_t boxes[] = {box[0], box[1], box[2]}, steps[] = {1, 1, 1};
  // The element type decides nothing but its size: no arithmetic is done on the way.
  return encode(reinterpret_cast<CUtensorMap*>(map), CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3,
                const_cast<void*>(base), sizes, stride_bytes, boxes, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

}  // namespace fusedmlp
