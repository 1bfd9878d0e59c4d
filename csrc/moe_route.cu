// Tokens to experts by histogram and stable rank: no sort, no atomics, no word to the host.
//
//   count_tokens: a block takes a chunk of tokens. A warp finds a token's expert; then one warp ranks
//     32 tokens at a time, where lanes with the same expert find each other by __match_any_sync.
//   place_tokens: a block sums the histograms of all chunks, and of those before its own, and gives
//     each of its tokens its row; dropped tokens come last, in their order.
//
// Every sum has one order: two runs give the same bits.
#include "moe_route.h"

#include "device.cuh"

namespace fusedmlp {
namespace {

constexpr int kWarp = 32, kThreads = 256, kWarps = kThreads / kWarp;
constexpr unsigned kAll = ~0u;

FUSEDMLP_DEVICE float to_float(float x) { return x; }
FUSEDMLP_DEVICE float to_float(__half x) { return __half2float(x); }
FUSEDMLP_DEVICE float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
FUSEDMLP_DEVICE void from_float(float x, float* out) { *out = x; }
FUSEDMLP_DEVICE void from_float(float x, __half* out) { *out = __float2half_rn(x); }
FUSEDMLP_DEVICE void from_float(float x, __nv_bfloat16* out) { *out = __float2bfloat16_rn(x); }

FUSEDMLP_DEVICE float warp_sum(float x) {
  for (int bits = kWarp / 2; bits; bits /= 2) x += __shfl_xor_sync(kAll, x, bits);
  return x;
}

FUSEDMLP_DEVICE int warp_sum(int x) {
  for (int bits = kWarp / 2; bits; bits /= 2) x += __shfl_xor_sync(kAll, x, bits);
  return x;
}

// The better of two (value, index): the larger, at a tie the lower index.
FUSEDMLP_DEVICE void keep_larger(float value, int index, float& best, int& at) {
  if (value > best || (value == best && index < at)) {
    best = value;
    at = index;
  }
}

struct Choice {
  int expert;
  float top, total;  // exp(z - top) summed; NaN where a logit is
};

// By a whole warp. The first NaN is chosen if there is one, as torch.argmax has it.
template <class T>
FUSEDMLP_DEVICE Choice choose(const T* logits, int64_t E, int64_t stride, int lane) {
  const float infinity = __int_as_float(0x7f800000);
  float top = -infinity;
  int at = static_cast<int>(E), nan = static_cast<int>(E);
  for (int e = lane; e < E; e += kWarp) {
    const float z = to_float(logits[e * stride]);
    if (z != z) {
      nan = e < nan ? e : nan;
    } else {
      keep_larger(z, e, top, at);
    }
  }
  for (int bits = kWarp / 2; bits; bits /= 2) {
    const float other = __shfl_xor_sync(kAll, top, bits);
    keep_larger(other, __shfl_xor_sync(kAll, at, bits), top, at);
    const int other_nan = __shfl_xor_sync(kAll, nan, bits);
    nan = other_nan < nan ? other_nan : nan;
  }
  float total = 0;
  for (int e = lane; e < E; e += kWarp) total += expf(to_float(logits[e * stride]) - top);
  return {nan < E ? nan : at < E ? at : 0, top, warp_sum(total)};
}

struct CountShared {
  int32_t* histogram;  // E
  int32_t* expert;     // chunk; -1: none of 0 .. E - 1
  float *top, *total;  // chunk
};

// Blocks a multiprocessor at least; 0: as ptxas likes. On sm_120 it would like six, and spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kCountingBlocks = 4;
#else
constexpr int kCountingBlocks = 0;
#endif

template <class T>
__global__ void __launch_bounds__(kThreads, kCountingBlocks) count_tokens(MoeRoute p) {
  int32_t* shared = dynamic_shared<int32_t>();
  const CountShared s{shared, shared + p.E, reinterpret_cast<float*>(shared + p.E + p.chunk),
                      reinterpret_cast<float*>(shared + p.E + 2 * p.chunk)};
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t begin = blockIdx.x * p.chunk;
  const int count = static_cast<int>(p.T - begin < p.chunk ? p.T - begin : p.chunk);
  const T* logits = static_cast<const T*>(p.logits) + begin * p.stride_t;

  for (int e = threadIdx.x; e < p.E; e += kThreads) s.histogram[e] = 0;
  if (p.logits != nullptr) {
    for (int t = warp; t < count; t += kWarps) {
      const Choice choice = choose(logits + t * p.stride_t, p.E, p.stride_e, lane);
      if (lane == 0) {
        s.expert[t] = choice.expert;
        s.top[t] = choice.top;
        s.total[t] = choice.total;
        p.expert[begin + t] = choice.expert;
        from_float(1 / choice.total, static_cast<T*>(p.prob) + begin + t);
        p.log_sum_exp[begin + t] = choice.top + logf(choice.total);
      }
    }
  } else {
    for (int t = threadIdx.x; t < count; t += kThreads) {
      const int64_t e = p.expert[begin + t];
      s.expert[t] = e >= 0 && e < p.E ? static_cast<int32_t>(e) : -1;
    }
  }
  __syncthreads();

  if (warp == 0) {
    for (int first = 0; first < count; first += kWarp) {
      const int t = first + lane;
      const int expert = t < count ? s.expert[t] : -1;
      const unsigned same = __match_any_sync(kAll, expert);
      const int earlier = __popc(same & ((1u << lane) - 1));
      const int before = expert < 0 ? 0 : s.histogram[expert];
      __syncwarp();
      if (expert >= 0) {
        p.rank[begin + t] = before + earlier;
        if (earlier == 0) s.histogram[expert] = before + __popc(same);
      }
      __syncwarp();
    }
  }
  __syncthreads();

  const int64_t row = blockIdx.x * p.E;
  for (int e = threadIdx.x; e < p.E; e += kThreads) {
    p.histograms[row + e] = s.histogram[e];
    if (p.logits == nullptr) continue;
    float sum = 0;
    for (int t = 0; t < count; ++t) {
      const float z = to_float(logits[t * p.stride_t + e * p.stride_e]);
      sum += expf(z - s.top[t]) / s.total[t];
    }
    p.sums[row + e] = sum;
  }
}

__global__ void __launch_bounds__(kThreads) place_tokens(MoeRoute p, int chunks) {
  int32_t* before = dynamic_shared<int32_t>();  // tokens of each expert in earlier chunks
  int32_t* starts = before + p.E;               // first row of each expert
  __shared__ int32_t all_kept, earlier_dropped;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, mine = blockIdx.x;
  const int64_t begin = mine * p.chunk;
  const int count = static_cast<int>(p.T - begin < p.chunk ? p.T - begin : p.chunk);
  const auto kept = [&](int tokens) {
    return tokens < p.capacity ? tokens : static_cast<int>(p.capacity);
  };

  for (int e = threadIdx.x; e < p.E; e += kThreads) {
    int total = 0, own = 0;
    float sum = 0;
    for (int c = 0; c < chunks; ++c) {
      const int n = p.histograms[c * p.E + e];
      total += n;
      if (c < mine) own += n;
      if (mine == 0 && p.mean_prob != nullptr) sum += p.sums[c * p.E + e];
    }
    before[e] = own;
    starts[e] = kept(total);
    if (mine == 0) {
      p.counts[e] = total;
      if (p.mean_prob != nullptr) p.mean_prob[e] = sum / p.T;
    }
  }
  __syncthreads();

  if (warp == 0) {
    int rows = 0, taken = 0;
    for (int first = 0; first < p.E; first += kWarp) {
      const int e = first + lane;
      const int n = e < p.E ? starts[e] : 0;
      int end = n;
      for (int delta = 1; delta < kWarp; delta *= 2) {
        const int left = __shfl_up_sync(kAll, end, delta);
        if (lane >= delta) end += left;
      }
      if (e < p.E) {
        starts[e] = rows + end - n;
        if (mine == 0) p.offsets[e + 1] = rows + end;
      }
      taken += warp_sum(e < p.E ? kept(before[e]) : 0);
      rows += __shfl_sync(kAll, end, kWarp - 1);
    }
    if (lane == 0) {
      all_kept = rows;
      earlier_dropped = static_cast<int32_t>(begin) - taken;
      if (mine == 0) {
        p.offsets[0] = 0;
        p.offsets[p.E + 1] = static_cast<int32_t>(p.T);
      }
    }
    __syncwarp();

    int dropped = earlier_dropped;
    for (int first = 0; first < count; first += kWarp) {
      const int t = first + lane;
      const int64_t e = t < count ? p.expert[begin + t] : 0;
      bool inside = t < count && e >= 0 && e < p.E;
      int row = 0;
      if (inside) {
        const int place = before[e] + p.rank[begin + t];
        inside = place < p.capacity;
        row = starts[e] + place;
      }
      const unsigned outside = __ballot_sync(kAll, t < count && !inside);
      if (!inside) row = all_kept + dropped + __popc(outside & ((1u << lane) - 1));
      dropped += __popc(outside);
      if (t < count) {
        p.rows[begin + t] = row;
        p.tokens[row] = static_cast<int32_t>(begin + t);
      }
    }
  }
}

template <class T>
cudaError_t enqueue(const MoeRoute& p, cudaStream_t stream) {
  const int chunks = static_cast<int>((p.T + p.chunk - 1) / p.chunk);
  const size_t counting = (p.E + 3 * p.chunk) * sizeof(int32_t);
  const cudaError_t error =
      launch(count_tokens<T>, dim3(chunks), dim3(kThreads), counting, stream, p);
  if (error != cudaSuccess) return error;
  return launch(place_tokens, dim3(chunks), dim3(kThreads), 2 * p.E * sizeof(int32_t), stream, p,
                chunks);
}

}  // namespace

const char* moe_route(const MoeRoute& p, void* stream) {
  cudaError_t error = use_device(p.device);
  const auto on = static_cast<cudaStream_t>(stream);
  if (error == cudaSuccess) {
    switch (p.dtype) {
      case MoeRoute::Dtype::bf16: error = enqueue<__nv_bfloat16>(p, on); break;
      case MoeRoute::Dtype::fp16: error = enqueue<__half>(p, on); break;
      case MoeRoute::Dtype::fp32: error = enqueue<float>(p, on); break;
    }
  }
  return error_text(error);
}

}  // namespace fusedmlp
