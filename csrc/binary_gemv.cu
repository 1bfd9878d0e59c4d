// Products of few rows of x with one-bit weights: words and scales pass through registers once, and
// their bytes are the time. One weight at a time on CUDA cores, 1.125 bits would take three
// instructions and more for each row of x; on the tensor cores it is one, for eight rows.
//
// A word's bits j and j + 16 become a pair of +-1 in 16 bits by one shift and one logical operation.
// Such pairs are the left operand of mma.m16n8k16, whose order within K is free as long as x, the
// right operand, has the same: x is staged in shared memory as pairs (j, j + 16). The four lanes of a
// row of the fragment take the four words of a group of 128, so a group is eight products into an
// accumulator of its own, which its scale multiplies in float32. Parts of D are summed by a second
// kernel in a fixed order.
#include "binary_gemv.h"

#include "activations.cuh"
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

// Bits j and j + 16 of a word as +-1.
template <class T>
FUSEDMLP_DEVICE unsigned signs(unsigned word, int j) {
  return and_xor(word << (15 - j), 0x80008000u, MinusOnes<T>::pair);
}

FUSEDMLP_DEVICE float to_float(bf16 value) { return __bfloat162float(value); }
FUSEDMLP_DEVICE float to_float(__half value) { return __half2float(value); }
FUSEDMLP_DEVICE void store(bf16* at, float value) { *at = __float2bfloat16_rn(value); }
FUSEDMLP_DEVICE void store(__half* at, float value) { *at = __float2half_rn(value); }

// What a lane reads: its word of each group, and the scale, of rows lane / 4 and lane / 4 + 8 of each
// tile.
struct Rows {
  const uint32_t* words[kTiles][2];
  const __half* scales[kTiles][2];
};
struct Weights {
  unsigned words[kGroups][kTiles][2];
  __half scales[kGroups][kTiles][2];
};

// The row of the weight that a warp's tile begins with.
template <bool GATED>
FUSEDMLP_DEVICE int64_t first_row(int tile) {
  const int64_t warp = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  return 16 * (GATED ? warp : kTiles * warp + tile);
}

// Past H the last row again, which is not stored.
template <bool GATED>
FUSEDMLP_DEVICE Rows rows_of(const BinaryGemv& p) {
  const int lane = threadIdx.x % 32;
  const int64_t groups = p.D / 128;
  Rows rows;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const bool up = GATED && tile == 1;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int64_t row = first_row<GATED>(tile) + lane / 4 + 8 * half;
      row = row < p.H ? row : p.H - 1;
      rows.words[tile][half] = (up ? p.q_up : p.q_gate) + 4 * row * groups + lane % 4;
      rows.scales[tile][half] = static_cast<const __half*>(up ? p.s_up : p.s_gate) + row * groups;
    }
  }
  return rows;
}

// Past `end` zeros.
FUSEDMLP_DEVICE void load(const Rows& rows, int group, int end, Weights& w) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t* words = rows.words[tile][half] + 4 * group;
      const __half* scales = rows.scales[tile][half] + group;
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        const bool inside = group + i < end;
        w.words[i][tile][half] = inside ? __ldg(words + 4 * i) : 0;
        w.scales[i][tile][half] = inside ? __ldg(scales + i) : __half(0.f);
      }
    }
  }
}

// x of kGroups groups as pairs; zeros past M and past `end`. A thread takes a word's 32 elements.
template <int NT>
FUSEDMLP_DEVICE void stage(const BinaryGemv& p, int group, int end,
                           uint4 (&pairs)[kGroups][NT][32][kPitch / 4]) {
  for (int task = threadIdx.x; task < kGroups * NT * 32; task += kThreads) {
    const int lane = task % 32, n = task / 32 % NT, i = task / 32 / NT;
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
          __byte_perm(a.x, b.x, 0x5410), __byte_perm(a.x, b.x, 0x7632),
          __byte_perm(a.y, b.y, 0x5410), __byte_perm(a.y, b.y, 0x7632)};
      pairs[i][n][lane][2 * part + 1] = {
          __byte_perm(a.z, b.z, 0x5410), __byte_perm(a.z, b.z, 0x7632),
          __byte_perm(a.w, b.w, 0x5410), __byte_perm(a.w, b.w, 0x7632)};
    }
  }
}

// sums += scale * (signs x') of kGroups groups.
template <class T, int NT>
FUSEDMLP_DEVICE void multiply(const Weights& w,
                              const uint4 (&pairs)[kGroups][NT][32][kPitch / 4],
                              float (&sums)[kTiles][NT][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    float group[kTiles][NT][4] = {};
#pragma unroll
    for (int quarter = 0; quarter < kPairs / 4; ++quarter) {
      uint4 x[NT];
#pragma unroll
      for (int n = 0; n < NT; ++n) x[n] = pairs[i][n][lane][quarter];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const unsigned upper = w.words[i][tile][0], lower = w.words[i][tile][1];
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          const int j = 4 * quarter + 2 * step;
          const uint32_t a[4] = {signs<T>(upper, j), signs<T>(lower, j), signs<T>(upper, j + 1),
                                 signs<T>(lower, j + 1)};
#pragma unroll
          for (int n = 0; n < NT; ++n) {
            const uint32_t b[2] = {step ? x[n].z : x[n].x, step ? x[n].w : x[n].y};
            mma_m16n8k16<T>(group[tile][n], a, b);
          }
        }
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const float scale = __half2float(w.scales[i][tile][c / 2]);
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
  with_activation(p.activation, [&](auto act) {
    const float value = decltype(act)::of(gate).value;
    store(static_cast<T*>(p.h) + m * p.H + row, GATED ? value * up : value);
  });
}

template <class T, bool GATED, int NT>
__global__ void __launch_bounds__(kThreads) gemv(BinaryGemv p) {
  __shared__ uint4 pairs[kGroups][NT][32][kPitch / 4];
  const int groups = int(p.D / 128), depth = (groups + p.splits - 1) / p.splits;
  const int begin = int(blockIdx.y) * depth;
  const int end = begin + depth < groups ? begin + depth : groups;
  const Rows rows = rows_of<GATED>(p);
  float sums[kTiles][NT][4] = {};
  Weights now, next;
  load(rows, begin, end, now);
  for (int group = begin; group < end; group += kGroups) {
    stage<NT>(p, group, end, pairs);
    load(rows, group + kGroups, end, next);
    __syncthreads();
    multiply<T, NT>(now, pairs, sums);
    __syncthreads();
    now = next;
  }
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < NT; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int64_t m = n * kTokens + 2 * (lane % 4) + c % 2;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const int64_t row = first_row<GATED>(tile) + lane / 4 + 8 * (c / 2);
        if (m >= p.M || row >= p.H) continue;
        if (p.splits > 1) {
          const int64_t part = GATED ? 2 * blockIdx.y + tile : blockIdx.y;
          p.parts[(part * p.M + m) * p.H + row] = sums[tile][n][c];
        } else if (!GATED || tile == 0) {
          finish<T, GATED>(p, m, row, sums[tile][n][c], sums[1][n][c]);
        }
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
  if (p.M > 2 * kTokens) return cudaErrorInvalidValue;
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
                               int dtype) {
  return fusedmlp::binary_gemv(
             {x, q_gate, s_gate, q_up, s_up, b_gate, b_up, h, parts, M, H, D, stride_x, splits,
              activation, static_cast<fusedmlp::Dtype>(dtype), 0},
             nullptr) != nullptr;
}
#endif
