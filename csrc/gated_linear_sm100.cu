// gated_linear and linear_act on Blackwell (sm_100f): the same GEMMs as on Hopper, their products by
// tcgen05 into tensor memory.
//
// A block has four roles. Warp 0's first thread produces, as on Hopper. Warp 1's first thread
// issues the products. Warp 2 holds tensor memory: two accumulators, so that one tile's epilogue
// runs under the next one's products. Warps 4 to 7 are the epilogue: each thread has a row.

#include <type_traits>

#include "blackwell.cuh"
#include "device.cuh"
#include "epilogue.cuh"
#include "gemm.cuh"

namespace fusedmlp {
namespace {

constexpr int kThreads = 2 * kWarpGroup;
constexpr int kBoxRows = 128, kBoxBytes = kBoxRows * kBox * 2;
constexpr int kHalf = 32;  // columns that the epilogue has in registers at a time

template <class T, bool GATED, bool BACKWARD>
struct Config : Operands<T, GATED, BACKWARD, BACKWARD ? 128 : 256> {
  using Base = Operands<T, GATED, BACKWARD, BACKWARD ? 128 : 256>;
  static constexpr int TMEM_COLUMNS = 2 * Base::BN;
  // The forward's boxes take turns; the backward's are two sets of (g then dg, u then du, h).
  static constexpr int BOXES = BACKWARD ? 6 : 2;
  static constexpr int STAGES =
      (kSharedMemory - kBarrierBytes - BOXES * kBoxBytes) / Base::STAGE_BYTES;
  static_assert(STAGES >= 4, "fewer do not hide a TMA load");
  static constexpr int CHUNKS = Base::COLUMNS / kBox;
};

template <class C>
struct Shared {
  alignas(1024) unsigned char stages[C::STAGES][C::STAGE_BYTES];
  unsigned char boxes[C::BOXES][kBoxBytes];
  uint64_t full[C::STAGES], empty[C::STAGES];
  uint64_t ready[2], drained[2];  // the accumulators
  uint64_t loaded[2];             // the sets of boxes
  uint32_t tmem;

  FUSEDMLP_DEVICE unsigned char* a(int stage) { return stages[stage]; }
  FUSEDMLP_DEVICE unsigned char* b(int stage) { return stages[stage] + C::A_BYTES; }
};

// Issues every product of the block's tiles.
template <class C>
FUSEDMLP_DEVICE void multiply(const Arguments& args, Shared<C>& shared) {
  constexpr uint32_t instruction =
      instruction_descriptor<typename C::T>(C::BM, C::BN, C::BACKWARD);
  const Schedule& schedule = args.schedule;
  const int step = gridDim.x / schedule.cluster;
  Ring<C::STAGES> ring;
  Ring<2> accumulator;
  for (int index = blockIdx.x / schedule.cluster; index < schedule.tiles();
       index += step, accumulator.next()) {
    barrier_wait(&shared.drained[accumulator.stage], accumulator.phase ^ 1);
    tcgen05_fence_after();
    const uint32_t d = shared.tmem + accumulator.stage * C::BN;
    for (int k = 0; k < args.k_steps; ++k, ring.next()) {
      barrier_wait(&shared.full[ring.stage], ring.phase);
      tcgen05_fence_after();
      const unsigned char *a = shared.a(ring.stage), *b = shared.b(ring.stage);
#pragma unroll
      for (int kk = 0; kk < C::BK / 16; ++kk) {
        const uint64_t rhs =
            C::BACKWARD ? matrix_descriptor_sm100(b + kk * 16 * 128, C::B_BOX_BYTES, 1024)
                        : matrix_descriptor_sm100(b + kk * 32, 0, 1024);
        tcgen05_mma(d, matrix_descriptor_sm100(a + kk * 32, 0, 1024), rhs, instruction,
                    k + kk > 0);
      }
      if (schedule.cluster == 1) {
        tcgen05_commit(&shared.empty[ring.stage]);
      } else {
        tcgen05_commit(&shared.empty[ring.stage], uint16_t{0b11});
      }
    }
    tcgen05_commit(&shared.ready[accumulator.stage]);
  }
}

// One thread of the epilogue: a row of every tile.
template <class C>
struct Row {
  Shared<C>& shared;
  int row, warp, lane;
  int box = 0;

  FUSEDMLP_DEVICE explicit Row(Shared<C>& shared_memory)
      : shared(shared_memory),
        row(threadIdx.x % kWarpGroup),
        warp(row / 32),
        lane(row % 32) {}

  FUSEDMLP_DEVICE bool leads() const { return row == 0; }
  FUSEDMLP_DEVICE void sync() const { named_sync(1, kWarpGroup); }

  // Where 8 columns of this row lie in a box.
  FUSEDMLP_DEVICE uint4* chunk_of(unsigned char* at, int chunk) const {
    return reinterpret_cast<uint4*>(at + 128 * row + 16 * (chunk ^ row % 8));
  }

  FUSEDMLP_DEVICE void load(float (&values)[kHalf], uint32_t accumulator, int column) const {
    tmem_load_x32(values, accumulator + (uint32_t(32 * warp) << 16) + column);
    tmem_load_wait(values);
  }

  // Nothing of the accumulator is read after this.
  FUSEDMLP_DEVICE void drain(int accumulator) const {
    tcgen05_fence_before();
    __syncwarp();
    if (lane == 0) barrier_arrive(&shared.drained[accumulator]);
  }
};

template <class C>
FUSEDMLP_DEVICE void put(const Row<C>& self, unsigned char* at, int half,
                         const float (&values)[kHalf]) {
  using T = typename C::T;
#pragma unroll
  for (int i = 0; i < kHalf / 8; ++i) {
    const float* v = values + 8 * i;
    *self.chunk_of(at, half * kHalf / 8 + i) =
        make_uint4(pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]),
                   pack<T>(v[6], v[7]));
  }
}

template <class C>
FUSEDMLP_DEVICE void take(const Row<C>& self, unsigned char* at, int half,
                          float (&values)[kHalf]) {
#pragma unroll
  for (int i = 0; i < kHalf / 8; ++i) {
    const uint4 packed = *self.chunk_of(at, half * kHalf / 8 + i);
    const uint32_t words[] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 both = unpack<typename C::T>(words[j]);
      values[8 * i + 2 * j] = both.x;
      values[8 * i + 2 * j + 1] = both.y;
    }
  }
}

// All threads of the epilogue read the same addresses.
template <class C>
FUSEDMLP_DEVICE void add_bias(const void* bias, int64_t n0, int64_t H, float (&values)[kHalf]) {
  using T = typename C::T;
#pragma unroll
  for (int i = 0; i < kHalf; i += 2) {
    if (n0 + i >= H) break;  // H is even
    const float2 both =
        unpack<T>(*reinterpret_cast<const uint32_t*>(static_cast<const T*>(bias) + n0 + i));
    values[i] += both.x;
    values[i + 1] += both.y;
  }
}

// One box of a result: into the next box of shared memory, and on its way out.
template <class C>
FUSEDMLP_DEVICE void store_box(Row<C>& self, const TensorMap* map, int n0, int m0,
                               const float (&values)[2][kHalf]) {
  unsigned char* at = self.shared.boxes[self.box];
  self.box = (self.box + 1) % C::BOXES;
  if (self.leads()) tma_store_wait_read<C::BOXES - 1>();
  self.sync();
  put(self, at, 0, values[0]);
  put(self, at, 1, values[1]);
  fence_async_shared();
  self.sync();
  if (self.leads()) {
    tma_store(map, at, n0, m0, 0);
    tma_store_commit();
  }
}

template <class C>
FUSEDMLP_DEVICE void finish_forward(const Arguments& args, Row<C>& self, TileAt tile,
                                    int accumulator) {
  const uint32_t from = self.shared.tmem + accumulator * C::BN;
  const int m0 = tile.m * C::BM;
#pragma unroll 1
  for (int chunk = 0; chunk < C::CHUNKS; ++chunk) {
    const int n0 = tile.n * C::COLUMNS + chunk * kBox;
    float g[2][kHalf], u[2][kHalf];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int column = chunk * kBox + half * kHalf;
      self.load(g[half], from, column);
      if (C::GATED) self.load(u[half], from, C::BN / 2 + column);
      const int n = n0 + half * kHalf;  // 64 bits would stay live: 6 registers
      if (args.bias[0] != nullptr) add_bias<C>(args.bias[0], n, args.H, g[half]);
      if (C::GATED && args.bias[1] != nullptr) add_bias<C>(args.bias[1], n, args.H, u[half]);
    }
    if (chunk == C::CHUNKS - 1) self.drain(accumulator);
    if (args.store_pair) {
      store_box(self, &args.out[1], n0, m0, g);
      if (C::GATED) store_box(self, &args.out[2], n0, m0, u);
    }
    if (args.store_h) {
      with_activation<C::GATED>(args.activation, args.scalars, [&](auto act) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int e = 0; e < kHalf; ++e) {
            g[half][e] =
                forward_of<C::GATED>(act, g[half][e], C::GATED ? u[half][e] : 0);
          }
        }
      });
      store_box(self, &args.out[0], n0, m0, g);
    }
  }
}

// The leader alone: g and u of a chunk, into the set of boxes whose stores have been read.
template <class C>
FUSEDMLP_DEVICE void load_pair(const Arguments& args, const Row<C>& self, TileAt tile, int chunk) {
  tma_store_wait_read<0>();
  const int n0 = tile.n * C::COLUMNS + chunk * kBox, m0 = tile.m * C::BM;
  uint64_t* loaded = &self.shared.loaded[chunk];
  barrier_expect(loaded, (C::GATED ? 2 : 1) * kBoxBytes);
  tma_load(self.shared.boxes[3 * chunk], &args.in[0], loaded, n0, m0, 0);
  if (C::GATED) tma_load(self.shared.boxes[3 * chunk + 1], &args.in[1], loaded, n0, m0, 0);
}

// Sums over 16 rows, a lane each, of 32 columns; every lane ends with two. Each step halves what a
// lane still carries.
FUSEDMLP_DEVICE float2 sum_rows(float (&v)[kHalf], int lane) {
#pragma unroll
  for (int half = kHalf / 2; half > 1; half /= 2) {
    const bool upper = lane & half / 2;
#pragma unroll
    for (int j = 0; j < half; ++j) {
      const float send = upper ? v[j] : v[j + half], keep = upper ? v[j + half] : v[j];
      v[j] = keep + __shfl_xor_sync(0xffffffff, send, half / 2);
    }
  }
  return make_float2(v[0], v[1]);
}

template <class C>
FUSEDMLP_DEVICE void store_sums(const Arguments& args, const Row<C>& self, int m0, int n0,
                                int which, float (&v)[kHalf]) {
  const float2 sum = sum_rows(v, self.lane);
  const int64_t row = (m0 + self.row) / GatedLinearBwd::kSumRows;
  const int64_t rows = Schedule::ceil_div(args.M, GatedLinearBwd::kSumRows);
  const int64_t n = n0 + 2 * (self.lane % 16);
  if (row < rows && n < args.H) {
    *reinterpret_cast<float2*>(args.sums + (which * rows + row) * args.H + n) = sum;
  }
}

template <class C>
FUSEDMLP_DEVICE void finish_chunk(const Arguments& args, const Row<C>& self, TileAt tile,
                                  int accumulator, int chunk) {
  const uint32_t from = self.shared.tmem + accumulator * C::BN + chunk * kBox;
  const int n0 = tile.n * C::COLUMNS + chunk * kBox, m0 = tile.m * C::BM;
  unsigned char* at = self.shared.boxes[3 * chunk];
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    float dh[kHalf], g[kHalf], u[kHalf] = {};
    self.load(dh, from, half * kHalf);
    take(self, at, half, g);
    if (C::GATED) take(self, at + kBoxBytes, half, u);
    with_activation<C::GATED>(args.activation, args.scalars, [&](auto act) {
#pragma unroll
      for (int e = 0; e < kHalf; ++e) {
        const Gradients d = backward_of<C::GATED>(act, dh[e], g[e], u[e]);
        g[e] = d.dg, u[e] = d.du, dh[e] = d.h;
      }
    });
    put(self, at, half, g);
    if (C::GATED) put(self, at + kBoxBytes, half, u);
    if (args.store_h) put(self, at + 2 * kBoxBytes, half, dh);
    if (args.sums != nullptr) {
      store_sums(args, self, m0, n0 + half * kHalf, 0, g);
      if (C::GATED) store_sums(args, self, m0, n0 + half * kHalf, 1, u);
    }
  }
  if (chunk == C::CHUNKS - 1) self.drain(accumulator);
  fence_async_shared();
  self.sync();
  if (self.leads()) {
    tma_store(&args.out[1], at, n0, m0, 0);
    if (C::GATED) tma_store(&args.out[2], at + kBoxBytes, n0, m0, 0);
    if (args.store_h) tma_store(&args.out[0], at + 2 * kBoxBytes, n0, m0, 0);
    tma_store_commit();
  }
}

template <class C>
FUSEDMLP_DEVICE void finish(const Arguments& args, Shared<C>& shared, int rank) {
  const Schedule& schedule = args.schedule;
  const int step = gridDim.x / schedule.cluster;
  Row<C> self(shared);
  Ring<2> accumulator;
  for (int index = blockIdx.x / schedule.cluster; index < schedule.tiles();
       index += step, accumulator.next()) {
    const TileAt tile = schedule.at(index, rank);
    if constexpr (C::BACKWARD) {
      static_assert(C::CHUNKS == 2, "one set of boxes for each chunk");
      if (self.leads()) {
        load_pair(args, self, tile, 0);
        load_pair(args, self, tile, 1);
      }
    }
    barrier_wait(&shared.ready[accumulator.stage], accumulator.phase);
    tcgen05_fence_after();
    if constexpr (C::BACKWARD) {
#pragma unroll 1
      for (int chunk = 0; chunk < C::CHUNKS; ++chunk) {
        // Loaded once a tile, so its parity alternates as the accumulators do.
        barrier_wait(&shared.loaded[chunk], accumulator.stage);
        finish_chunk(args, self, tile, accumulator.stage, chunk);
      }
    } else {
      finish_forward(args, self, tile, accumulator.stage);
    }
  }
  if (self.leads()) tma_store_wait_read<0>();  // shared memory must outlive its readers
}

template <class C>
__global__ void __launch_bounds__(kThreads, 1) gemm(const __grid_constant__ Arguments args) {
  Shared<C>& shared = *dynamic_shared<Shared<C>>();
  const int cluster = args.schedule.cluster;
  const int rank = cluster == 1 ? 0 : cluster_rank();
  const int warp = threadIdx.x / 32;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < C::STAGES; ++stage) {
      barrier_init(&shared.full[stage], 1);
      barrier_init(&shared.empty[stage], cluster);  // every block that reads a part of it
    }
    for (int i = 0; i < 2; ++i) {
      barrier_init(&shared.ready[i], 1);
      barrier_init(&shared.drained[i], 4);
      barrier_init(&shared.loaded[i], 1);
    }
    barrier_init_fence();
    prefetch(&args.a);
    prefetch(&args.b[0]);
    if (C::GATED && !C::BACKWARD) prefetch(&args.b[1]);
  }
  if (warp == 2) {
    tmem_alloc(&shared.tmem, C::TMEM_COLUMNS);
    tmem_give_up_permit();
  }
  tcgen05_fence_before();
  // No block may reach into another's shared memory before its barriers are there.
  __syncthreads();
  tcgen05_fence_after();
  cluster_arrive();
  cluster_wait();
  if (threadIdx.x == 0) {
    produce<C>(args, shared, rank);
  } else if (threadIdx.x == 32) {
    multiply<C>(args, shared);
  } else if (warp >= 4) {
    finish<C>(args, shared, rank);
  }
  __syncwarp();
  tcgen05_fence_before();
  __syncthreads();
  tcgen05_fence_after();
  if (warp == 2) tmem_free(shared.tmem, C::TMEM_COLUMNS);
  // Nor leave while another still does.
  cluster_arrive();
  cluster_wait();
}

// ---- host ------------------------------------------------------------------------------------

template <class C, class Params>
const char* launch_gemm(const Arguments& args, const Params& p, void* stream) {
  static_assert(sizeof(Shared<C>) <= kSharedMemory);
  return launch_persistent(gemm<C>, kThreads, sizeof(Shared<C>), args, p, stream);
}

template <class T, class Params>
const char* enqueue(const Params& p, bool gated, void* stream) {
  constexpr bool BACKWARD = std::is_same_v<Params, GatedLinearBwd>;
  const Variant* variant = pick(kSm100, p);
  if (variant == nullptr) return "no such variant";
  const int cluster = variant->cluster;
  // Before any descriptor is made: the driver makes none on a thread without a context.
  if (const char* error = error_text(use_device(p.device))) return error;
  Arguments args;
  if (const char* error = arguments_of(p, BACKWARD ? 128 : 256, cluster, kBoxRows, true, &args)) {
    return error;
  }
  return (gated ? launch_gemm<Config<T, true, BACKWARD>, Params>
                : launch_gemm<Config<T, false, BACKWARD>, Params>)(args, p, stream);
}

}  // namespace

const char* gated_linear_fwd_sm100(const GatedLinearFwd& p, void* stream) {
  const auto run = p.dtype == Dtype::bf16 ? enqueue<__nv_bfloat16, GatedLinearFwd>
                                          : enqueue<__half, GatedLinearFwd>;
  return run(p, p.w_up != nullptr, stream);
}

const char* gated_linear_bwd_sm100(const GatedLinearBwd& p, void* stream) {
  const auto run = p.dtype == Dtype::bf16 ? enqueue<__nv_bfloat16, GatedLinearBwd>
                                          : enqueue<__half, GatedLinearBwd>;
  return run(p, p.u != nullptr, stream);
}

}  // namespace fusedmlp
