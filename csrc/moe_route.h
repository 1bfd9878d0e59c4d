// What the routing kernels are asked to do: plain integers and raw pointers, no torch. Fields as in
// fusedmlp.Routing; Python checks and allocates.
#pragma once

#include <cstdint>

namespace fusedmlp {

// Each of T tokens to the expert of its largest logit among E; with logits null, to the one that
// `expert` holds, and prob, log_sum_exp and mean_prob are null. logits (T, E) with strides in
// elements. At most `capacity` tokens an expert. T and E at least 1. Scratch: rank (T), histograms
// and sums (ceil(T / chunk), E).
struct MoeRoute {
  enum class Dtype : int { bf16, fp16, fp32 };
  static constexpr int kMaxExperts = 4096, kMaxChunk = 1024;  // of the shared memory that they need

  const void* logits;
  int64_t* expert;
  void* prob;
  float *log_sum_exp, *mean_prob;
  int32_t *tokens, *rows, *offsets, *counts;  // offsets (E + 2)
  int32_t *rank, *histograms;
  float* sums;
  int64_t T, E, stride_t, stride_e;
  int64_t chunk;  // tokens of a block, a multiple of 32
  int64_t capacity;
  Dtype dtype;
  int device;
};

// Enqueues both kernels on `stream`, a cudaStream_t. nullptr on success, else what failed.
const char* moe_route(const MoeRoute&, void* stream);

}  // namespace fusedmlp
