// What the gated linear kernels are asked to do: plain integers and raw pointers, no torch. Python
// (fusedmlp/_cuda_gated_linear.py) checks and allocates; bindings.cpp fills these; a launcher obeys.
#pragma once

#include <cstdint>

namespace fusedmlp {

enum class Dtype : int { bf16, fp16 };

// h = act(x wg' + bg) * (x wu' + bu); with w_up null, h = act(x wg' + bg). x (M, D), weights (H, D),
// h, g, u (M, H), biases (H,). Any of h, g, u may be null: not wanted. Strides are of rows, in
// elements; the other dimension is contiguous.
struct GatedLinearFwd {
  const void *x, *w_gate, *w_up, *b_gate, *b_up;
  void *h, *g, *u;
  int64_t M, H, D;
  int64_t stride_x, stride_gate, stride_up, stride_h, stride_gu;
  int activation;  // its number in activations.cuh
  Dtype dtype;
  int device, multiprocessors;
  int variant;  // which tile of the kernel's table; -1: the kernel's choice
};

// With dh = dy w_down: dg = dh u act'(g), du = dh act(g), h = act(g) u; with u null, dg = dh
// act'(g), h = act(g). dy (M, D), w_down (D, H), the others (M, H). h may be null, and so may sums
// (2, or 1 with u null; ceil(M / kSumRows); H): float32 column sums of dg and du over each kSumRows
// rows.
struct GatedLinearBwd {
  static constexpr int kSumRows = 16;

  const void *dy, *w_down, *g, *u;
  void *dg, *du, *h;
  float* sums;
  int64_t M, H, D;
  int64_t stride_dy, stride_down, stride_gu, stride_dgu, stride_h;
  int activation;
  Dtype dtype;
  int device, multiprocessors;
  int variant;
};

// Enqueue on `stream`, a cudaStream_t. nullptr on success, else what failed: a static or
// thread-local string. No sticky CUDA error is left.
const char* gated_linear_fwd_sm90(const GatedLinearFwd&, void* stream);
const char* gated_linear_bwd_sm90(const GatedLinearBwd&, void* stream);
const char* gated_linear_fwd_sm100(const GatedLinearFwd&, void* stream);
const char* gated_linear_bwd_sm100(const GatedLinearBwd&, void* stream);

}  // namespace fusedmlp
