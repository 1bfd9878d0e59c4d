// What the gated linear kernels are asked to do: plain integers and raw pointers, no torch. Python
// (fusedmlp/backends/cuda/gated_linear.py) checks and allocates; bindings.cpp fills these; a launcher obeys.
#pragma once

#include <cstdint>

namespace fusedmlp {

enum class Dtype : int { bf16, fp16 };

// A schedule of a kernel; `variant` below is its place in the table of its kernel and architecture.
// Cooperative: one 128 x 256 tile for both consumers; ping-pong: 128 x 128 tiles, in turn.
struct Variant {
  const char* name;
  bool pingpong;
  int cluster;  // blocks that share their weight tiles
};
inline constexpr Variant kFwdSm90[] = {{"cooperative-cluster2", false, 2},
                                       {"cooperative-cluster1", false, 1},
                                       {"pingpong-cluster2", true, 2},
                                       {"pingpong-cluster1", true, 1}};
inline constexpr Variant kBwdSm90[] = {{"pingpong-cluster2", true, 2},
                                       {"pingpong-cluster1", true, 1}};
inline constexpr Variant kSm100[] = {{"cluster2", false, 2}, {"cluster1", false, 1}};

// h = phi(g) psi(u), g = x wg' + bg, u = x wu' + bu; with w_up null, h = act(g). psi(u) is u but for a
// gate. x (M, D), weights (H, D), h, g, u (M, H), biases (H,). Any of h, g, u may be null: not wanted.
// Strides are of rows, in elements; the other dimension is contiguous.
struct GatedLinearFwd {
  const void *x, *w_gate, *w_up, *b_gate, *b_up;
  void *h, *g, *u;
  int64_t M, H, D;
  int64_t stride_x, stride_gate, stride_up, stride_h, stride_gu;
  int activation;    // its number in activations.cuh
  float scalars[3];  // its row's numbers, in the row's order
  Dtype dtype;
  int device, multiprocessors;
  int variant;  // a place in its table; -1: the kernel's choice
};

// With dh = dy w_down: dg = dh psi(u) phi'(g), du = dh phi(g) psi'(u), h = phi(g) psi(u); with u null,
// dg = dh act'(g), h = act(g). dy (M, D), w_down (D, H), the others (M, H). h may be null, and so may sums
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
  float scalars[3];
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
