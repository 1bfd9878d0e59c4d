// What the kernel for few rows over one-bit weights is asked to do: plain integers and raw pointers,
// no torch. Python (fusedmlp/backends/cuda/binary.py) checks and allocates.
#pragma once

#include <cstdint>

#include "gated_linear.h"

namespace fusedmlp {

// h = phi(x wg' + bg) * psi(x wu' + bu); with q_up null, h = act(x wg' + bg). x (M, D), h (M, H)
// contiguous, biases (H,) or null. A weight (H, D) is +-scale: words (H, D / 32), bit k % 32 of word
// k / 32 set for +, and float16 scales (H, D / 128). D is a multiple of 128, rows of x begin on 16
// bytes, M is at most 16. D is cut into `splits` parts; with more than one, parts holds their
// products: (splits, 2, or 1 with q_up null, M, H), else it may be null.
struct BinaryGemv {
  const void* x;
  const uint32_t* q_gate;
  const void* s_gate;
  const uint32_t* q_up;
  const void* s_up;
  const void *b_gate, *b_up;
  void* h;
  float* parts;
  int64_t M, H, D;
  int64_t stride_x;
  int splits;
  int activation;    // its number in activations.cuh
  float scalars[3];  // its row's numbers, in the row's order
  Dtype dtype;
  int device;
};

// Enqueue on `stream`, a cudaStream_t. nullptr on success, else what failed: a static or
// thread-local string. No sticky CUDA error is left.
const char* binary_gemv(const BinaryGemv&, void* stream);

}  // namespace fusedmlp
