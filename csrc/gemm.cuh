// What the GEMMs of every architecture share: operands and arguments, the ring of stages and its
// producer, descriptors. Names: A (M, K), B (K, N), result (M, N); K is D.
//
// The forward's B tile is BN/2 rows of w_gate over BN/2 rows of w_up: a thread then holds g and u of
// one element, no shuffle, no repacked weight. The backward's B is w_down (D, H) read as it lies,
// MN-major. In a cluster of two, the blocks take neighbouring rows of tiles, and each loads half of
// the weight tile for both (multicast).
#pragma once

#include <algorithm>
#include <cstdio>
#include <iterator>

#include "device.cuh"
#include "gated_linear.h"
#include "hopper.cuh"
#include "schedule.cuh"
#include "tensor_map.h"

namespace fusedmlp {
namespace {

constexpr int kWarpGroup = 128;
constexpr int kSharedMemory = 232448;  // of a block, on sm_90 and sm_100
constexpr int kBarrierBytes = 256;
constexpr int kBox = 64;  // columns of a staged box of a result: 128 bytes

// How one stage lies in shared memory.
template <class Element, bool IS_GATED, bool IS_BACKWARD, int TILE_N>
struct Operands {
  using T = Element;
  static constexpr bool GATED = IS_GATED, BACKWARD = IS_BACKWARD;
  static constexpr int BM = 128, BN = TILE_N, BK = 64;
  // Columns of the result: the forward's B holds gate and up of each.
  static constexpr int COLUMNS = GATED && !BACKWARD ? BN / 2 : BN;
  static constexpr int A_BYTES = BM * BK * 2;
  static constexpr int B_BOX_BYTES = BN / 2 * BK * 2;  // B comes in two boxes
  static constexpr int STAGE_BYTES = A_BYTES + 2 * B_BOX_BYTES;
};

struct Arguments {
  TensorMap a, b[2];
  TensorMap out[3];  // h, g, u; backward: h, dg, du
  TensorMap in[2];   // backward: g, u
  const void* bias[2];
  float* sums;
  int64_t M, H;
  Schedule schedule;
  int k_steps, activation;
  float scalars[3];
  bool store_h, store_pair;
};

// A position in the ring of stages.
template <int STAGES>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;

  FUSEDMLP_DEVICE void skip(int steps) {
    const int to = stage + steps;
    phase ^= to / STAGES & 1;
    stage = to % STAGES;
  }
  FUSEDMLP_DEVICE void next() {
    if (++stage == STAGES) {
      stage = 0;
      phase ^= 1;
    }
  }
};

template <class C, class S>
FUSEDMLP_DEVICE void load_weights(const Arguments& args, S& shared, int stage, int box,
                                  int n0, int k0, int cluster) {
  unsigned char* to = shared.b(stage) + box * C::B_BOX_BYTES;
  const TensorMap* map = &args.b[C::GATED && !C::BACKWARD ? box : 0];
  // Gate and up have the same rows; other boxes lie side by side.
  const int n = C::GATED && !C::BACKWARD ? n0 : n0 + box * C::BN / 2;
  const int c0 = C::BACKWARD ? n : k0, c1 = C::BACKWARD ? k0 : n;
  if (cluster == 1) {
    tma_load(to, map, &shared.full[stage], c0, c1, 0);
  } else {
    tma_load(to, map, &shared.full[stage], c0, c1, 0, uint16_t{0b11});
  }
}

template <class C, class S>
FUSEDMLP_DEVICE void produce(const Arguments& args, S& shared, int rank) {
  const Schedule& schedule = args.schedule;
  const int step = gridDim.x / schedule.cluster;
  Ring<C::STAGES> ring;
  for (int index = blockIdx.x / schedule.cluster; index < schedule.tiles(); index += step) {
    const TileAt tile = schedule.at(index, rank);
    for (int k = 0; k < args.k_steps; ++k, ring.next()) {
      barrier_wait(&shared.empty[ring.stage], ring.phase ^ 1);
      barrier_expect(&shared.full[ring.stage], C::STAGE_BYTES);
      tma_load(shared.a(ring.stage), &args.a, &shared.full[ring.stage], k * C::BK, tile.m * C::BM, 0);
      for (int box = rank; box < 2; box += schedule.cluster) {
        load_weights<C>(args, shared, ring.stage, box, tile.n * C::COLUMNS, k * C::BK,
                        schedule.cluster);
      }
    }
  }
  // A block must not leave while another's arrivals are on their way to it.
  for (int i = 0; i < C::STAGES; ++i, ring.next()) {
    barrier_wait(&shared.empty[ring.stage], ring.phase ^ 1);
  }
}

template <class T>
FUSEDMLP_DEVICE uint32_t pack(float low, float high);
template <>
FUSEDMLP_DEVICE uint32_t pack<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(both);
}
template <>
FUSEDMLP_DEVICE uint32_t pack<__half>(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(both);
}

template <class T>
FUSEDMLP_DEVICE float2 unpack(uint32_t both);
template <>
FUSEDMLP_DEVICE float2 unpack<__nv_bfloat16>(uint32_t both) {
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(both));
}
template <>
FUSEDMLP_DEVICE float2 unpack<__half>(uint32_t both) {
  return __half22float2(reinterpret_cast<const __half2&>(both));
}

struct Corner {
  int m, n;  // first row and column
};

// The box of the tile that is the backward's chunk.
template <class C>
FUSEDMLP_DEVICE Corner box_of(TileAt tile, int chunk) {
  constexpr int ACROSS = C::COLUMNS / kBox;
  return {tile.m * C::BM + chunk / ACROSS * 64, tile.n * C::COLUMNS + chunk % ACROSS * kBox};
}

// ---- host ------------------------------------------------------------------------------------

// The descriptors of one call. A null matrix gets none: no kernel reads it.
class Maps {
 public:
  explicit Maps(bool blackwell) : blackwell_(blackwell) {}

  // The descriptor of a matrix (rows, columns), handed out in boxes of (box_rows, 64).
  void add(TensorMap* map, const char* name, const void* base, int64_t rows, int64_t columns,
           int64_t stride, int box_rows) {
    if (base == nullptr) return;
    const uint64_t size[] = {uint64_t(columns), uint64_t(rows), 1};
    // As if other matrices followed: the stride of a dimension holds all of the one before.
    const uint64_t strides[] = {uint64_t(stride), uint64_t(stride) * uint64_t(rows)};
    const uint32_t box[] = {64, uint32_t(box_rows), 1};
    const int error = encode_tensor_map(map, base, size, strides, box, true, blackwell_);
    if (error != 0) refused_ = name, error_ = error;
  }
  const char* error() const {
    if (refused_ == nullptr) return nullptr;
    static thread_local char text[96];
    std::snprintf(text, sizeof text, "the driver made no TMA descriptor of %s (error %d)", refused_,
                  error_);
    return text;
  }

 private:
  const bool blackwell_;
  const char* refused_ = nullptr;
  int error_ = 0;
};

constexpr const char* kNoUp = "the activation is a gate, and there is no up";

// What a kernel with B tiles of tile_n and staged boxes of box_rows needs for a call.
inline const char* arguments_of(const GatedLinearFwd& p, int tile_n, int cluster, int box_rows,
                                bool blackwell, Arguments* args) {
  const bool gated = p.w_up != nullptr;
  if (!gated && is_gate(p.activation)) return kNoUp;
  Maps maps(blackwell);
  maps.add(&args->a, "x", p.x, p.M, p.D, p.stride_x, 128);
  maps.add(&args->b[0], "w_gate", p.w_gate, p.H, p.D, p.stride_gate, tile_n / 2);
  maps.add(&args->b[1], "w_up", p.w_up, p.H, p.D, p.stride_up, tile_n / 2);
  maps.add(&args->out[0], "h", p.h, p.M, p.H, p.stride_h, box_rows);
  maps.add(&args->out[1], "g", p.g, p.M, p.H, p.stride_gu, box_rows);
  maps.add(&args->out[2], "u", p.u, p.M, p.H, p.stride_gu, box_rows);
  args->bias[0] = p.b_gate, args->bias[1] = p.b_up;
  args->sums = nullptr;
  args->M = p.M, args->H = p.H;
  args->schedule = Schedule(p.M, p.H, 128, gated ? tile_n / 2 : tile_n, cluster);
  args->k_steps = Schedule::ceil_div(p.D, 64);
  args->activation = p.activation;
  std::copy(std::begin(p.scalars), std::end(p.scalars), args->scalars);
  args->store_h = p.h != nullptr, args->store_pair = p.g != nullptr;
  return maps.error();
}

inline const char* arguments_of(const GatedLinearBwd& p, int tile_n, int cluster, int box_rows,
                                bool blackwell, Arguments* args) {
  if (p.u == nullptr && is_gate(p.activation)) return kNoUp;
  Maps maps(blackwell);
  maps.add(&args->a, "dy", p.dy, p.M, p.D, p.stride_dy, 128);
  maps.add(&args->b[0], "w_down", p.w_down, p.D, p.H, p.stride_down, 64);
  maps.add(&args->in[0], "g", p.g, p.M, p.H, p.stride_gu, box_rows);
  maps.add(&args->in[1], "u", p.u, p.M, p.H, p.stride_gu, box_rows);
  maps.add(&args->out[0], "h", p.h, p.M, p.H, p.stride_h, box_rows);
  maps.add(&args->out[1], "dg", p.dg, p.M, p.H, p.stride_dgu, box_rows);
  maps.add(&args->out[2], "du", p.du, p.M, p.H, p.stride_dgu, box_rows);
  args->bias[0] = args->bias[1] = nullptr;
  args->sums = p.sums;
  args->M = p.M, args->H = p.H;
  args->schedule = Schedule(p.M, p.H, 128, tile_n, cluster);
  args->k_steps = Schedule::ceil_div(p.D, 64);
  args->activation = p.activation;
  std::copy(std::begin(p.scalars), std::end(p.scalars), args->scalars);
  args->store_h = p.h != nullptr, args->store_pair = true;
  return maps.error();
}

// Is there work, and room, for clusters of two?
template <class Params>
bool pairs(const Params& p) {
  return p.M > 128 && p.multiprocessors > 1;
}

// The variant asked for, or nullptr; by default the first, or the one without clusters where a
// second block would have nothing to do.
template <size_t COUNT, class Params>
const Variant* pick(const Variant (&table)[COUNT], const Params& p) {
  const int variant = p.variant >= 0 ? p.variant : pairs(p) ? 0 : 1;
  return variant < static_cast<int>(COUNT) ? &table[variant] : nullptr;
}

// Persistent: every cluster that fits the GPU at once walks the tiles.
template <class Params>
const char* launch_persistent(void (*kernel)(const Arguments), int threads, size_t shared_bytes,
                              const Arguments& args, const Params& p, void* stream) {
  const int cluster = args.schedule.cluster;
  const int clusters = std::min(args.schedule.tiles(), std::max(1, p.multiprocessors / cluster));
  return error_text(launch_clusters(dim3(cluster), kernel, dim3(clusters * cluster), dim3(threads),
                                    shared_bytes, static_cast<cudaStream_t>(stream), args));
}

}  // namespace
}  // namespace fusedmlp
