// csrc/moe_route.cu for tests/support/simt_build.py.
#include "moe_route.cu"

using fusedmlp::MoeRoute;

extern "C" int run_moe_route(const void* logits, int64_t* expert, void* prob, float* log_sum_exp,
                             float* mean_prob, int32_t* tokens, int32_t* rows, int32_t* offsets,
                             int32_t* counts, int32_t* rank, int32_t* histograms, float* sums,
                             int64_t T, int64_t E, int64_t stride_t, int64_t stride_e,
                             int64_t chunk, int64_t capacity, int dtype) {
  const MoeRoute p{logits, expert, prob, log_sum_exp, mean_prob, tokens, rows, offsets, counts,
                   rank, histograms, sums, T, E, stride_t, stride_e, chunk, capacity,
                   static_cast<MoeRoute::Dtype>(dtype), 0};
  return fusedmlp::moe_route(p, nullptr) != nullptr;
}
