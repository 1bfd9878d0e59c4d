// What the masked gated linear's kernel for few rows is asked to do: plain integers and raw
// pointers, no torch. Python (fusedmlp/backends/cuda/masked.py) checks and allocates.
#pragma once

#include <cstdint>

#include "gated_linear.h"

namespace fusedmlp {

// h = sum_i phi(g_i) * psi(t - g_i), with t = x w' and g_i = x (m_i * w)'. x (M, D), w (H, D), h (M, H)
// contiguous; planes (H, D / 8, n_m) bytes, byte (h, j, i) holding mask i of the weights
// (h, 8 j .. 8 j + 7), lowest bit first. D is a multiple of 8, rows of x and w begin on 16 bytes,
// n_m is 1, 2, 4 or 8. D is cut into `splits` parts; with more than one, parts holds their t and
// g_i: (splits, 1 + n_m, M, H), else it may be null. Strides are of rows, in elements.
struct MaskedGatedGemv {
  const void *x, *w;
  const uint8_t* planes;
  void* h;
  float* parts;
  int64_t M, H, D;
  int64_t stride_x, stride_w;
  int n_m, splits;
  int activation;    // its number in activations.cuh
  float scalars[3];  // its row's numbers, in the row's order
  Dtype dtype;
  int device;
};

// Enqueue on `stream`, a cudaStream_t. nullptr on success, else what failed: a static or
// thread-local string. No sticky CUDA error is left.
const char* masked_gated_gemv(const MaskedGatedGemv&, void* stream);

}  // namespace fusedmlp
