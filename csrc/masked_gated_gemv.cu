// The masked gated linear for few rows of x: weights and bit planes pass through registers once, and
// their bytes are the time. A warp takes a few rows of w and walks its part of D in octets, one a
// lane: 16 bytes of weights beside n_m bytes of masks. For each weight there is one FMA into the
// total and one, predicated by the mask's bit, into each g_i; the complement is total - g_i. Parts
// of D are summed by a second kernel in a fixed order.
#include "masked_gated_gemv.h"

#include "device.cuh"
#include "epilogue.cuh"

namespace fusedmlp {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kOctet = 8;
// Rows of w times rows of x in one warp: what keeps enough bytes in flight within the registers.
constexpr int kPairs = 4;
constexpr int kRows = 4;  // of x, at most, in one block

using bf16 = __nv_bfloat16;

// The masks of an octet, one byte each, and the bits of mask i.
template <int N_M>
struct Masks;
template <>
struct Masks<1> {
  uint8_t word;
  FUSEDMLP_DEVICE unsigned byte(int) const { return word; }
};
template <>
struct Masks<2> {
  uint16_t word;
  FUSEDMLP_DEVICE unsigned byte(int i) const { return word >> 8 * i; }
};
template <>
struct Masks<4> {
  unsigned word;
  FUSEDMLP_DEVICE unsigned byte(int i) const { return word >> 8 * i; }
};
template <>
struct Masks<8> {
  uint2 word;
  FUSEDMLP_DEVICE unsigned byte(int i) const { return (i < 4 ? word.x : word.y) >> 8 * (i % 4); }
};

FUSEDMLP_DEVICE float2 unpack(unsigned pair, bf16) {
  // A bf16 is the upper half of its float.
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

FUSEDMLP_DEVICE float2 unpack(unsigned pair, __half) {
  const __half2 halves = *reinterpret_cast<const __half2*>(&pair);
  return __half22float2(halves);
}

template <class T>
FUSEDMLP_DEVICE void unpack(const uint4& octet, float (&values)[kOctet]) {
  const unsigned pairs[] = {octet.x, octet.y, octet.z, octet.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 two = unpack(pairs[i], T());
    values[2 * i] = two.x;
    values[2 * i + 1] = two.y;
  }
}

FUSEDMLP_DEVICE void store(bf16* at, float value) { *at = __float2bfloat16_rn(value); }
FUSEDMLP_DEVICE void store(__half* at, float value) { *at = __float2half_rn(value); }

FUSEDMLP_DEVICE float warp_sum(float value) {
#pragma unroll
  for (int bits = 16; bits; bits /= 2) value += __shfl_xor_sync(~0u, value, bits);
  return value;
}

// sums: total, g_1, ..
template <int N_M>
FUSEDMLP_DEVICE float combine(const MaskedGatedGemv& p, const float (&sums)[1 + N_M]) {
  float h = 0;
  with_activation<true>(p.activation, p.scalars, [&](auto act) {
#pragma unroll
    for (int i = 1; i <= N_M; ++i) h += forward_of<true>(act, sums[i], sums[0] - sums[i]);
  });
  return h;
}

// Loads weights that may be read again, or not.
template <int XS, class W>
FUSEDMLP_DEVICE W read(const W* at) {
  return XS < kRows ? __ldcs(at) : __ldcg(at);
}

// ROWS rows of w from row `first` on, over XS rows of x from row m0 on. What lies past H or M is
// computed for the last row again and not stored.
template <class T, int N_M, int ROWS, int XS>
// Without the bound nvcc 13.0 takes two to six registers more for one of them on sm_100f and sm_120f, and
// six blocks fit where seven do.
__global__ void __launch_bounds__(kThreads, N_M == 4 && XS == 2 ? 7 : 0) gemv(MaskedGatedGemv p) {
  const int lane = threadIdx.x % 32;
  // Blocks of the same weights follow one another, so that memory is read for the first alone.
  const bool once = XS < kRows;
  const unsigned passes = once ? 1 : (unsigned(p.M) + XS - 1) / XS;
  const int64_t first = (int64_t(blockIdx.x / passes) * kWarps + threadIdx.x / 32) * ROWS;
  // A constant 0 makes the compiler spill a register of sm_100.
  const int64_t m0 = int64_t(once ? blockIdx.z : blockIdx.x % passes) * XS;
  if (first >= p.H) return;
  const int64_t octets = p.D / kOctet;
  const int64_t depth = (octets + p.splits - 1) / p.splits;
  const int64_t begin = blockIdx.y * depth;
  const int64_t end = begin + depth < octets ? begin + depth : octets;

  const uint4* w[ROWS];
  const Masks<N_M>* masks[ROWS];
  const uint4* x[XS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const int64_t row = first + r < p.H ? first + r : p.H - 1;
    w[r] = reinterpret_cast<const uint4*>(static_cast<const T*>(p.w) + row * p.stride_w);
    masks[r] = reinterpret_cast<const Masks<N_M>*>(p.planes) + row * octets;
  }
#pragma unroll
  for (int m = 0; m < XS; ++m) {
    const int64_t row = m0 + m < p.M ? m0 + m : p.M - 1;
    x[m] = reinterpret_cast<const uint4*>(static_cast<const T*>(p.x) + row * p.stride_x);
  }

  float sums[ROWS][XS][1 + N_M] = {};
#pragma unroll (N_M * XS < 4 ? 2 : 1)
  for (int64_t k = begin + lane; k < end; k += 32) {
    uint4 weights[ROWS];
    Masks<N_M> kept[ROWS];
    float values[XS][kOctet];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      weights[r] = read<XS>(w[r] + k);
      kept[r].word = read<XS>(&masks[r][k].word);
    }
#pragma unroll
    for (int m = 0; m < XS; ++m) unpack<T>(__ldg(x[m] + k), values[m]);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      float row[kOctet];
      unpack<T>(weights[r], row);
#pragma unroll
      for (int j = 0; j < kOctet; ++j) {
#pragma unroll
        for (int m = 0; m < XS; ++m) {
          sums[r][m][0] = fmaf(row[j], values[m][j], sums[r][m][0]);
        }
      }
#pragma unroll
      for (int i = 0; i < N_M; ++i) {
        const unsigned bits = kept[r].byte(i);
#pragma unroll
        for (int j = 0; j < kOctet; ++j) {
#pragma unroll
          for (int m = 0; m < XS; ++m) {
            if (bits >> j & 1) sums[r][m][1 + i] = fmaf(row[j], values[m][j], sums[r][m][1 + i]);
          }
        }
      }
    }
  }

  // Through shared memory, so that a lane has each of the warp's results, and the code of all
  // activations is here once.
  __shared__ float results[kWarps][ROWS * XS][1 + N_M];
  auto& own = results[threadIdx.x / 32];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
#pragma unroll
    for (int m = 0; m < XS; ++m) {
#pragma unroll
      for (int i = 0; i <= N_M; ++i) {
        const float sum = warp_sum(sums[r][m][i]);
        if (lane == 0) own[r * XS + m][i] = sum;
      }
    }
  }
  __syncwarp();
  const int64_t m = m0 + lane % XS, row = first + lane / XS;
  if (lane >= ROWS * XS || row >= p.H || m >= p.M) return;
  const auto& mine = own[lane];
  const int64_t at = m * p.H + row, size = p.M * p.H;
  if (p.splits == 1) {
    store(static_cast<T*>(p.h) + at, combine<N_M>(p, mine));
  } else {
    float* part = p.parts + blockIdx.y * (1 + N_M) * size + at;
#pragma unroll
    for (int i = 0; i <= N_M; ++i) part[i * size] = mine[i];
  }
}

template <class T, int N_M>
__global__ void __launch_bounds__(kThreads) add_parts(MaskedGatedGemv p) {
  const int64_t size = p.M * p.H, at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= size) return;
  float sums[1 + N_M] = {};
  for (int part = 0; part < p.splits; ++part) {
#pragma unroll
    for (int i = 0; i <= N_M; ++i) sums[i] += p.parts[(part * int64_t(1 + N_M) + i) * size + at];
  }
  store(static_cast<T*>(p.h) + at, combine<N_M>(p, sums));
}

template <class T, int N_M, int XS>
cudaError_t enqueue(const MaskedGatedGemv& p, cudaStream_t stream) {
  constexpr int ROWS = kPairs / XS;
  const auto cover = [](int64_t n, int64_t by) { return unsigned((n + by - 1) / by); };
  const dim3 blocks(cover(p.H, ROWS * kWarps) * cover(p.M, XS), p.splits);
  cudaError_t error = launch(gemv<T, N_M, ROWS, XS>, blocks, dim3(kThreads), 0, stream, p);
  if (error == cudaSuccess && p.splits > 1) {
    error = launch(add_parts<T, N_M>, dim3(cover(p.M * p.H, kThreads)), dim3(kThreads), 0, stream,
                   p);
  }
  return error;
}

// More than kRows rows of x read the weights again, from L2.
template <class T, int N_M>
cudaError_t pick_rows(const MaskedGatedGemv& p, cudaStream_t stream) {
  if (p.M == 1) return enqueue<T, N_M, 1>(p, stream);
  if (p.M == 2) return enqueue<T, N_M, 2>(p, stream);
  return enqueue<T, N_M, kRows>(p, stream);
}

template <class T>
cudaError_t pick_masks(const MaskedGatedGemv& p, cudaStream_t stream) {
  switch (p.n_m) {
    case 1:
      return pick_rows<T, 1>(p, stream);
    case 2:
      return pick_rows<T, 2>(p, stream);
    case 4:
      return pick_rows<T, 4>(p, stream);
    case 8:
      return pick_rows<T, 8>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

const char* masked_gated_gemv(const MaskedGatedGemv& p, void* stream) {
  cudaError_t error = use_device(p.device);
  const auto queue = static_cast<cudaStream_t>(stream);
  if (error == cudaSuccess) {
    error = p.dtype == Dtype::bf16 ? pick_masks<bf16>(p, queue) : pick_masks<__half>(p, queue);
  }
  return error_text(error);
}

}  // namespace fusedmlp

#ifndef __CUDACC__
// For tests/simt.
extern "C" int run_masked_gated_gemv(const void* x, const void* w, const uint8_t* planes, void* h,
                                     float* parts, int64_t M, int64_t H, int64_t D,
                                     int64_t stride_x, int64_t stride_w, int n_m, int splits,
                                     int activation, const float* scalars, int dtype) {
  return fusedmlp::masked_gated_gemv(
             {x, w, planes, h, parts, M, H, D, stride_x, stride_w, n_m, splits, activation,
              {scalars[0], scalars[1], scalars[2]}, static_cast<fusedmlp::Dtype>(dtype), 0},
             nullptr) != nullptr;
}
#endif
