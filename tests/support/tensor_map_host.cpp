// csrc/tensor_map.cpp on a machine without a driver: a driver of one version that notes what it is
// asked for, and returns a map of ones.
#include "tensor_map.cpp"

#include <cstring>

namespace {

struct Asked {
  uint64_t rank, size[5], stride[4], box[5];
} asked;
int driver_version = 13000;

CUresult encode(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void*, const cuuint64_t* size,
                const cuuint64_t* stride, const cuuint32_t* box, const cuuint32_t*,
                CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                CUtensorMapFloatOOBfill) {
  asked.rank = rank;
  for (cuuint32_t i = 0; i < rank; ++i) {
    asked.size[i] = size[i], asked.box[i] = box[i];
    if (i + 1 < rank) asked.stride[i] = stride[i];
  }
  std::memset(map, 0xff, sizeof *map);
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** entry, unsigned int, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  *entry = reinterpret_cast<void*>(&encode);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) {
  *version = driver_version;
  return cudaSuccess;
}

void set_driver(int version) { driver_version = version; }  // before the first map

// What the driver was asked for, as `Asked` has it; then both words that begin the map.
int make_map(const uint64_t* size, const uint64_t* stride, const uint32_t* box, bool blackwell,
             uint64_t* noted, uint64_t* words) {
  alignas(64) static char memory[64];
  fusedmlp::TensorMap map;
  const int error = fusedmlp::encode_tensor_map(&map, memory, size, stride, box, true, blackwell);
  std::memcpy(noted, &asked, sizeof asked);
  std::memcpy(words, &map, 16);
  return error;
}
}
