// A TMA descriptor, and how one is made. No CUDA header is needed to hold one.
#pragma once

#include <cstdint>

namespace fusedmlp {

struct alignas(64) TensorMap {
  unsigned char bytes[128];  // the driver's CUtensorMap
};

// A tensor map of 16-bit elements in up to three dimensions, innermost first and contiguous. size, box and
// stride (of dimensions 1 and 2) in elements; a dimension of size 1 is strided as if others followed.
// With `swizzle`, 128-byte rows of the box have their 16-byte chunks permuted by the row. Elements outside
// load as 0 and are not stored. blackwell: for a GPU of compute capability 10 or newer, see
// tensor_map.cpp. 0, or the driver's error, or -1 where it has no such function.
int encode_tensor_map(TensorMap* map, const void* base, const uint64_t size[3],
                       const uint64_t stride[2], const uint32_t box[3], bool swizzle,
                       bool blackwell = false);

}  // namespace fusedmlp
