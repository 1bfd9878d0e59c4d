// csrc/tensor_map.cpp on a machine without a driver: a driver of one version that notes what it is
// asked for, and returns a map of ones; or one that has no such function, or fails.
#include "tensor_map.cpp"

#include <cstring>
#include <utility>

namespace {

struct Asked {
  uint64_t rank, size[5], stride[4], box[5], step[5], swizzled, at;
} asked;
int driver_version = 13000;
cudaError_t found = cudaSuccess, last_error = cudaSuccess;
cudaDriverEntryPointQueryResult has = cudaDriverEntryPointSuccess;

CUresult encode(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* at,
                const cuuint64_t* size, const cuuint64_t* stride, const cuuint32_t* box,
                const cuuint32_t* step, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  asked.rank = rank, asked.at = reinterpret_cast<uint64_t>(at);
  asked.swizzled = swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
  for (cuuint32_t i = 0; i < rank; ++i) {
    asked.size[i] = size[i], asked.box[i] = box[i], asked.step[i] = step[i];
    if (i + 1 < rank) asked.stride[i] = stride[i];
  }
  std::memset(map, 0xff, sizeof *map);
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** entry, unsigned int, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *entry = reinterpret_cast<void*>(&encode);
  *result = has;
  return last_error = found;
}
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaDriverGetVersion(int* version) {
  *version = driver_version < 0 ? 99999 : driver_version;
  return driver_version < 0 ? cudaErrorInvalidValue : cudaSuccess;
}

// Before the first map. A negative version: it does not say which it is.
void set_driver(int version, bool fails, bool lacks) {
  driver_version = version;
  if (fails) found = cudaErrorInvalidValue;
  if (lacks) has = cudaDriverEntryPointSymbolNotFound;
}

// What the driver was asked for, as `Asked` has it; then both words that begin the map.
int make_map(const void* at, const uint64_t* size, const uint64_t* stride, const uint32_t* box,
             bool swizzle, bool blackwell, uint64_t* noted, uint64_t* words) {
  fusedmlp::TensorMap map;
  const int error = fusedmlp::encode_tensor_map(&map, at, size, stride, box, swizzle, blackwell);
  std::memcpy(noted, &asked, sizeof asked);
  std::memcpy(words, &map, 16);
  return error;
}
}
