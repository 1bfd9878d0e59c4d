// Products of few rows of x with one-bit weights: words and scales pass through registers once, and
// their bytes are the time. One weight at a time on CUDA cores, 1.125 bits would take three
// instructions and more for each row of x; on the tensor cores it is one, for eight rows.
//
// A word's bits j and j + 16 become a pair of 16-bit numbers by one logical operation and half a
// shift: moved to bit 15, the sign, an odd j makes +-1; at bit 14 of either type an even j makes 2 or
// 0, which is +-1 once the sum of its x is subtracted. That sum is a product with -1, shared by all
// rows. The pairs are the left operand of mma.m16n8k16, whose order within K is free as long as x, the
// right operand, has the same: x is staged in shared memory as pairs (j, j + 16), even j beside even
// ones. The four lanes of a row of the fragment take the four words of a group of 128, so a group is
// eight products into an accumulator of its own, which its scale multiplies in float32. Parts of D are
// summed by a second kernel in a fixed order.
#include "binary_gemv.h"

#include "epilogue.cuh"
#include "mma.cuh"

namespace fusedmlp {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kTiles = 2;    // of 16 rows, in one warp: plain, or one of gate and one of up
constexpr int kGroups = 4;   // staged at a time
constexpr int kPairs = 16;   // of a word
constexpr int kPitch = 20;   // words for the pairs of a lane: what spreads eight lanes over all banks
constexpr int kTokens = 8;   // rows of x in one fragment

using bf16 = __nv_bfloat16;

template <class T>
struct MinusOnes;
template <>
struct MinusOnes<bf16> {
  static constexpr unsigned pair = 0xbf80bf80u;
};
template <>
struct MinusOnes<__half> {
  static constexpr unsigned pair = 0xbc00bc00u;
};

// (a & b) ^ c. Of two constants the compiler makes two operations with an immediate each.
FUSEDMLP_DEVICE unsigned and_xor(unsigned a, unsigned b, unsigned c) {
#ifdef __CUDA_ARCH__
  unsigned y;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
  return y;
#else
  return (a & b) ^ c;
#endif
}

FUSEDMLP_DEVICE float to_float(bf16 value) { return __bfloat162float(value); }
FUSEDMLP_DEVICE float to_float(__half value) { return __half2float(value); }
FUSEDMLP_DEVICE void store(bf16* at, float value) { *at = __float2bfloat16_rn(value); }
FUSEDMLP_DEVICE void store(__half* at, float value) { *at = __float2half_rn(value); }

// Where a lane reads, of rows lane / 4 and lane / 4 + 8 of each tile: its word of a group, and the scale
// of the group lane % 4 further on.
struct Rows {
  const uint32_t* words[kTiles][2];
  const __half* scales[kTiles];
  unsigned at[kTiles][2];  // of scales
};
using Words = unsigned[kTiles][2];
using Scales = float[kTiles][2];

// The row of the weight that a warp's tile begins with.
template <bool GATED>
FUSEDMLP_DEVICE int64_t first_row(int tile) {
  const int64_t warp = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  return 16 * (GATED ? warp : kTiles * warp + tile);
}

// From group `begin` on. Past H the last row again, which is not stored.
template <bool GATED>
FUSEDMLP_DEVICE Rows rows_of(const BinaryGemv& p, int begin) {
  const int lane = threadIdx.x % 32;
  Rows rows;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const bool up = GATED && tile == 1;
    rows.scales[tile] = static_cast<const __half*>(up ? p.s_up : p.s_gate);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = first_row<GATED>(tile) + lane / 4 + 8 * half;
      const int64_t at = (row < p.H ? row : p.H - 1) * (p.D / 128) + begin;
      rows.words[tile][half] = (up ? p.q_up : p.q_gate) + 4 * at + lane % 4;
      rows.at[tile][half] = unsigned(at) + lane % 4;
    }
  }
  return rows;
}

// Reads the group `i` from where `rows` is.
FUSEDMLP_DEVICE void load(const Rows& rows, int i, Words& words) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      words[tile][half] = __ldg(rows.words[tile][half] + 4 * i);
    }
  }
}

FUSEDMLP_DEVICE void load(const Rows& rows, Scales& scales) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      scales[tile][half] = __half2float(__ldg(rows.scales[tile] + rows.at[tile][half]));
    }
  }
}

FUSEDMLP_DEVICE void advance(Rows& rows, int groups) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      rows.words[tile][half] += 4 * groups;
      rows.at[tile][half] += groups;
    }
  }
}

// x of kGroups groups as pairs; zeros past M and past `end`. A warp takes a group, a thread a word's
// 32 elements.
template <int NT>
FUSEDMLP_DEVICE void stage(const BinaryGemv& p, int group, int end,
                           uint4 (&pairs)[kGroups][NT][32][kPitch / 4]) {
  static_assert(kWarps == kGroups);
  const int i = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < NT; ++n) {
    const int64_t m = n * kTokens + lane / 4;
    uint4 low[2] = {}, high[2] = {};
    if (m < p.M && group + i < end) {
      const auto* row = static_cast<const uint16_t*>(p.x) + m * p.stride_x;
      const auto* from = reinterpret_cast<const uint4*>(row + int64_t(group + i) * 128 + lane % 4 * 32);
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        low[part] = __ldg(from + part);
        high[part] = __ldg(from + 2 + part);
      }
    }
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const uint4 a = low[part], b = high[part];
      pairs[i][n][lane][2 * part] = {
          __byte_perm(a.x, b.x, 0x5410), __byte_perm(a.y, b.y, 0x5410),
          __byte_perm(a.x, b.x, 0x7632), __byte_perm(a.y, b.y, 0x7632)};
      pairs[i][n][lane][2 * part + 1] = {
          __byte_perm(a.z, b.z, 0x5410), __byte_perm(a.w, b.w, 0x5410),
          __byte_perm(a.z, b.z, 0x7632), __byte_perm(a.w, b.w, 0x7632)};
    }
  }
}

// sums += scale * (signs x') of one group, the `own`th of kGroups.
template <class T, int NT>
FUSEDMLP_DEVICE void multiply(const Words& words, const Scales& scales, int own,
                              const uint4 (&pairs)[NT][32][kPitch / 4],
                              float (&sums)[kTiles][NT][4]) {
  constexpr unsigned kMinus = MinusOnes<T>::pair, kSigns = 0x80008000u, kTwos = 0x40004000u;
  const int lane = threadIdx.x % 32;
  uint4 x[NT][kPairs / 4];
  float minus_even[NT][4] = {}, group[kTiles][NT][4];
#pragma unroll
  for (int n = 0; n < NT; ++n) {
#pragma unroll
    for (int i = 0; i < kPairs / 4; ++i) {
      x[n][i] = pairs[n][lane][i];
      mma_m16n8k16<T>(minus_even[n], {kMinus, kMinus, kMinus, kMinus}, {x[n][i].x, x[n][i].y});
    }
  }
#pragma unroll
  for (int i = 0; i < kPairs / 4; ++i) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const unsigned upper = words[tile][0], lower = words[tile][1];
      const int left = kPairs - 2 - 4 * i;  // of the bits 4 i and 4 i + 1; 2 less for the next two
      const unsigned u[2] = {upper << left, upper << (left - 2)};
      const unsigned l[2] = {lower << left, lower << (left - 2)};
      const uint32_t even[4] = {u[0] & kTwos, l[0] & kTwos, u[1] & kTwos, l[1] & kTwos};
      const uint32_t odd[4] = {and_xor(u[0], kSigns, kMinus), and_xor(l[0], kSigns, kMinus),
                               and_xor(u[1], kSigns, kMinus), and_xor(l[1], kSigns, kMinus)};
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        mma_m16n8k16<T>(group[tile][n], even, {x[n][i].x, x[n][i].y},
                        i == 0 ? minus_even[n] : group[tile][n]);
        mma_m16n8k16<T>(group[tile][n], odd, {x[n][i].z, x[n][i].w});
      }
    }
  }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float scale = __shfl_sync(0xffffffffu, scales[tile][half], lane / 4 * 4 + own);
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int c = 2 * half; c < 2 * half + 2; ++c) {
          sums[tile][n][c] = fmaf(scale, group[tile][n][c], sums[tile][n][c]);
        }
      }
    }
  }
}

template <class T, bool GATED>
FUSEDMLP_DEVICE void finish(const BinaryGemv& p, int64_t m, int64_t row, float gate, float up) {
  if (p.b_gate != nullptr) gate += to_float(static_cast<const T*>(p.b_gate)[row]);
  if (GATED && p.b_up != nullptr) up += to_float(static_cast<const T*>(p.b_up)[row]);
  float h = 0;
  with_activation<GATED>(p.activation, p.scalars,
                         [&](auto act) { h = forward_of<GATED>(act, gate, up); });
  store(static_cast<T*>(p.h) + m * p.H + row, h);
}

template <class T, bool GATED, int NT>
// Without the bound on the plain product of two fragments of x, nvcc 13.0 spills one of its registers.
__global__ void __launch_bounds__(kThreads, NT == 1 || GATED ? 0 : 2) gemv(BinaryGemv p) {
  __shared__ uint4 pairs[kGroups][NT][32][kPitch / 4];
  const int groups = int(p.D / 128), depth = (groups + p.splits - 1) / p.splits;
  const int begin = int(blockIdx.y) * depth;
  const int end = begin + depth < groups ? begin + depth : groups;
  Rows rows = rows_of<GATED>(p, begin);
  float sums[kTiles][NT][4] = {};
  // Past `end` whatever was there stays, and meets an x of zeros.
  Words words[kGroups] = {};
  Scales scales = {};
  const int own = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    if (begin + i < end) load(rows, i, words[i]);
  }
  if (begin + own < end) load(rows, scales);
  for (int group = begin; group < end; group += kGroups) {
    stage<NT>(p, group, end, pairs);
    __syncthreads();
    advance(rows, kGroups);
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      multiply<T, NT>(words[i], scales, i, pairs[i], sums);
      if (group + kGroups + i < end) load(rows, i, words[i]);
    }
    if (group + kGroups + own < end) load(rows, scales);
    __syncthreads();
  }
  const int lane = threadIdx.x % 32;
  // Through shared memory, so that the code of all activations is here once: registers have no index.
  constexpr int kResults = 4 * NT;  // of a tile
  using Results = float[kTiles][kResults][kThreads];
  static_assert(sizeof(Results) <= sizeof(pairs));
  Results& results = reinterpret_cast<Results&>(pairs);
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < kResults; ++i) results[tile][i][threadIdx.x] = sums[tile][i / 4][i % 4];
  }
#pragma unroll 1
  for (int i = 0; i < kResults; ++i) {
    const int64_t m = i / 4 * kTokens + 2 * (lane % 4) + i % 2;
#pragma unroll 1
    for (int tile = 0; tile < kTiles; ++tile) {
      const int64_t row = first_row<GATED>(tile) + lane / 4 + 8 * (i % 4 / 2);
      if (m >= p.M || row >= p.H) continue;
      const float sum = results[tile][i][threadIdx.x];
      if (p.splits > 1) {
        const int64_t part = GATED ? 2 * blockIdx.y + tile : blockIdx.y;
        p.parts[(part * p.M + m) * p.H + row] = sum;
      } else if (!GATED || tile == 0) {
        finish<T, GATED>(p, m, row, sum, GATED ? results[1][i][threadIdx.x] : 0);
      }
    }
  }
}

template <class T, bool GATED>
__global__ void __launch_bounds__(kThreads) add_parts(BinaryGemv p) {
  const int64_t size = p.M * p.H, at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= size) return;
  constexpr int kProducts = GATED ? 2 : 1;
  float sums[2] = {};
  for (int64_t part = 0; part < p.splits; ++part) {
#pragma unroll
    for (int i = 0; i < kProducts; ++i) sums[i] += p.parts[(part * kProducts + i) * size + at];
  }
  finish<T, GATED>(p, at / p.H, at % p.H, sums[0], sums[1]);
}

template <class T, bool GATED, int NT>
cudaError_t enqueue(const BinaryGemv& p, cudaStream_t stream) {
  constexpr int kRows = 16 * kWarps * (GATED ? 1 : kTiles);
  const auto cover = [](int64_t n, int64_t by) { return unsigned((n + by - 1) / by); };
  const dim3 blocks(cover(p.H, kRows), p.splits);
  cudaError_t error = launch(gemv<T, GATED, NT>, blocks, dim3(kThreads), 0, stream, p);
  if (error == cudaSuccess && p.splits > 1) {
    error = launch(add_parts<T, GATED>, dim3(cover(p.M * p.H, kThreads)), dim3(kThreads), 0,
                   stream, p);
  }
  return error;
}

template <class T, bool GATED>
cudaError_t pick_tokens(const BinaryGemv& p, cudaStream_t stream) {
  if (p.M > 2 * kTokens || (!GATED && is_gate(p.activation))) return cudaErrorInvalidValue;
  return p.M > kTokens ? enqueue<T, GATED, 2>(p, stream) : enqueue<T, GATED, 1>(p, stream);
}

template <class T>
cudaError_t pick_gate(const BinaryGemv& p, cudaStream_t stream) {
  return p.q_up ? pick_tokens<T, true>(p, stream) : pick_tokens<T, false>(p, stream);
}

}  // namespace

const char* binary_gemv(const BinaryGemv& p, void* stream) {
  cudaError_t error = use_device(p.device);
  const auto queue = static_cast<cudaStream_t>(stream);
  if (error == cudaSuccess) {
    error = p.dtype == Dtype::bf16 ? pick_gate<bf16>(p, queue) : pick_gate<__half>(p, queue);
  }
  return error_text(error);
}

}  // namespace fusedmlp

#ifndef __CUDACC__
// For tests/simt.
extern "C" int run_binary_gemv(const void* x, const uint32_t* q_gate, const void* s_gate,
                               const uint32_t* q_up, const void* s_up, const void* b_gate,
                               const void* b_up, void* h, float* parts, int64_t M, int64_t H,
                               int64_t D, int64_t stride_x, int splits, int activation,
                               const float* scalars, int dtype) {
  return fusedmlp::binary_gemv(
             {x, q_gate, s_gate, q_up, s_up, b_gate, b_up, h, parts, M, H, D, stride_x, splits,
              activation, {scalars[0], scalars[1], scalars[2]},
              static_cast<fusedmlp::Dtype>(dtype), 0},
             nullptr) != nullptr;
}
#endif
