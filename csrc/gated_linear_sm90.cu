// gated_linear and linear_act on Hopper: the forward GEMM with bias, activation and product in
// registers, and the backward's dh GEMM with the gradient of the gate in its epilogue.
//
// A block is three warp groups. The first one's first thread produces: it brings tiles of A and B
// into a ring of stages by TMA. The other two consume: wgmma into registers, then the epilogue,
// through shared memory out by TMA. Blocks are persistent. Two schedules:
//
//   cooperative  both consumers work on one 128 x 256 tile, 64 rows each; least traffic
//   ping-pong    each consumer has 128 x 128 tiles of its own in turn: while one is in its epilogue
//                the other keeps the tensor cores busy; for heavy epilogues

#include <type_traits>

#include "device.cuh"
#include "epilogue.cuh"
#include "gemm.cuh"

namespace fusedmlp {
namespace {

constexpr int kThreads = 3 * kWarpGroup;
constexpr int kBoxRows = 64, kBoxBytes = kBoxRows * kBox * 2;

template <class T, bool GATED, bool BACKWARD, bool IS_PINGPONG>
struct Config : Operands<T, GATED, BACKWARD, IS_PINGPONG ? 128 : 256> {
  using Base = Operands<T, GATED, BACKWARD, IS_PINGPONG ? 128 : 256>;
  static constexpr bool PINGPONG = IS_PINGPONG;
  static constexpr int ROW_BLOCKS = PINGPONG ? 2 : 1;  // of 64 rows, for each consumer
  static constexpr int CONSUMERS = PINGPONG ? 1 : 2;   // that read one stage
  // Boxes of each consumer: the forward's take turns; the backward's are two sets of (g then dg, u
  // then du, h).
  static constexpr int BOXES = BACKWARD ? 6 : 2;
  static constexpr int STAGES =
      (kSharedMemory - kBarrierBytes - 2 * BOXES * kBoxBytes) / Base::STAGE_BYTES;
  static constexpr int CHUNKS = ROW_BLOCKS * Base::COLUMNS / kBox;  // boxes of a result tile
  static_assert(STAGES == (PINGPONG && !BACKWARD ? 6 : 4), "fewer stages do not hide a TMA load");
  static_assert(!BACKWARD || PINGPONG, "the backward's boxes leave a cooperative tile 3 stages");
  static_assert(!BACKWARD || CHUNKS % 4 == 0, "parities of `loaded` repeat every two uses a set");
};

template <class C>
struct Shared {
  alignas(1024) unsigned char stages[C::STAGES][C::STAGE_BYTES];
  unsigned char boxes[2][C::BOXES][kBoxBytes];
  uint64_t full[C::STAGES], empty[C::STAGES];
  uint64_t loaded[2][2];  // consumer, set
  uint64_t turn[2];       // ping-pong: the consumer may start to multiply

  FUSEDMLP_DEVICE unsigned char* a(int stage) { return stages[stage]; }
  FUSEDMLP_DEVICE unsigned char* b(int stage) { return stages[stage] + C::A_BYTES; }
};

// One consumer's thread: where it stands, and its part of shared memory.
template <class C>
struct Consumer {
  Shared<C>& shared;
  int group;  // 0 or 1
  int thread, warp, lane;
  int box = 0;

  FUSEDMLP_DEVICE explicit Consumer(Shared<C>& shared_memory)
      : shared(shared_memory),
        group(threadIdx.x / kWarpGroup - 1),
        thread(threadIdx.x % kWarpGroup),
        warp(thread / 32),
        lane(thread % 32) {}

  FUSEDMLP_DEVICE bool leads() const { return thread == 0; }
  FUSEDMLP_DEVICE void sync() const { named_sync(1 + group, kWarpGroup); }

  // Where this lane's row of 16 bytes lies for the 16 x 16 elements at columns 16 * column of its
  // warp's rows; matrices are (rows 0-7, 8-15) of the left 8 columns, then of the right 8.
  FUSEDMLP_DEVICE unsigned char* row_of(unsigned char* at, int column) const {
    const int row = 16 * warp + lane % 16, chunk = 2 * column + lane / 16;
    return at + 128 * row + 16 * (chunk ^ row % 8);
  }
};

// acc = A B over all of K; leaves `ring` behind the tile. Ping-pong consumers multiply in turn: one
// mbarrier exposes one phase bit, so a consumer two fills ahead could not tell them apart.
template <class C>
FUSEDMLP_DEVICE void multiply(const Arguments& args, const Consumer<C>& self, Ring<C::STAGES>& ring,
                              uint32_t turn, float (&acc)[C::ROW_BLOCKS][C::BN / 2]) {
  Shared<C>& shared = self.shared;
  const uint32_t cluster = args.schedule.cluster;
  const int first_row = C::PINGPONG ? 0 : 64 * self.group;
  if (C::PINGPONG) barrier_wait(&shared.turn[self.group], turn);
  int previous = 0;
  for (int k = 0; k < args.k_steps; ++k, ring.next()) {
    barrier_wait(&shared.full[ring.stage], ring.phase);
    const unsigned char* a = shared.a(ring.stage) + 128 * first_row;
    const unsigned char* b = shared.b(ring.stage);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < C::BK / 16; ++kk) {
      const uint64_t rhs = C::BACKWARD
                               ? matrix_descriptor(b + kk * 16 * 128, C::B_BOX_BYTES, 1024)
                               : matrix_descriptor(b + kk * 32, 0, 1024);
#pragma unroll
      for (int i = 0; i < C::ROW_BLOCKS; ++i) {
        wgmma<typename C::T, C::BN, C::BACKWARD>(
            acc[i], matrix_descriptor(a + i * 64 * 128 + kk * 32, 0, 1024), rhs, k + kk > 0);
      }
    }
    wgmma_commit();
    // The step before is done: its stage goes back, in every block that may write into it.
    wgmma_wait<1>();
    if (k > 0 && self.lane < cluster) barrier_arrive(&shared.empty[previous], self.lane);
    previous = ring.stage;
  }
  if (C::PINGPONG && self.lane == 0) barrier_arrive(&shared.turn[1 - self.group]);
  wgmma_wait<0>();
  if (self.lane < cluster) barrier_arrive(&shared.empty[previous], self.lane);
#pragma unroll
  for (int i = 0; i < C::ROW_BLOCKS; ++i) wgmma_result(acc[i]);
}

// A fragment of 64 columns is 32 values of a thread: values 8 c + i lie in columns 16 c to 16 c + 15.
template <class C>
FUSEDMLP_DEVICE void put(const Consumer<C>& self, unsigned char* at, int column,
                         const float* values) {
  stmatrix_x4(self.row_of(at, column), pack<typename C::T>(values[0], values[1]),
              pack<typename C::T>(values[2], values[3]), pack<typename C::T>(values[4], values[5]),
              pack<typename C::T>(values[6], values[7]));
}

template <class C>
FUSEDMLP_DEVICE void take(const Consumer<C>& self, unsigned char* at, int column, float* values) {
  uint32_t packed[4];
  ldmatrix_x4(packed, self.row_of(at, column));
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 both = unpack<typename C::T>(packed[i]);
    values[2 * i] = both.x;
    values[2 * i + 1] = both.y;
  }
}

template <class C>
FUSEDMLP_DEVICE void add_bias(const Consumer<C>& self, const void* bias, int64_t n0, int64_t H,
                              float* values) {
  using T = typename C::T;
#pragma unroll
  for (int j = 0; j < kBox / 8; ++j) {
    const int64_t n = n0 + 8 * j + 2 * (self.lane % 4);
    if (n >= H) continue;  // H is even
    const float2 both =
        unpack<T>(*reinterpret_cast<const uint32_t*>(static_cast<const T*>(bias) + n));
    values[4 * j] += both.x;
    values[4 * j + 1] += both.y;
    values[4 * j + 2] += both.x;
    values[4 * j + 3] += both.y;
  }
}

// One box of a result: into the consumer's next box of shared memory, and on its way out.
template <class C>
FUSEDMLP_DEVICE void store_box(Consumer<C>& self, const TensorMap* map, int n0, int m0,
                               const float* values) {
  unsigned char* at = self.shared.boxes[self.group][self.box];
  self.box = (self.box + 1) % C::BOXES;
  if (self.leads()) tma_store_wait_read<C::BOXES - 1>();
  self.sync();
#pragma unroll
  for (int column = 0; column < kBox / 16; ++column) put(self, at, column, values + 8 * column);
  fence_async_shared();
  self.sync();
  if (self.leads()) {
    tma_store(map, at, n0, m0, 0);
    tma_store_commit();
  }
}

template <class C>
FUSEDMLP_DEVICE void finish_forward(const Arguments& args, Consumer<C>& self, TileAt tile,
                                    float (&acc)[C::ROW_BLOCKS][C::BN / 2]) {
#pragma unroll
  for (int i = 0; i < C::ROW_BLOCKS; ++i) {
    const int m0 = tile.m * C::BM + 64 * (C::PINGPONG ? i : self.group);
#pragma unroll
    for (int j = 0; j < C::COLUMNS / kBox; ++j) {
      const int n0 = tile.n * C::COLUMNS + j * kBox;
      float* g = &acc[i][32 * j];
      float* u = &acc[i][C::GATED ? C::BN / 4 + 32 * j : 32 * j];
      if (args.bias[0] != nullptr) add_bias(self, args.bias[0], n0, args.H, g);
      if (C::GATED && args.bias[1] != nullptr) add_bias(self, args.bias[1], n0, args.H, u);
      if (args.store_pair) {
        store_box(self, &args.out[1], n0, m0, g);
        if (C::GATED) store_box(self, &args.out[2], n0, m0, u);
      }
      if (args.store_h) {
        with_activation<C::GATED>(args.activation, args.scalars, [&](auto act) {
#pragma unroll
          for (int e = 0; e < 32; ++e) g[e] = forward_of<C::GATED>(act, g[e], u[e]);
        });
        store_box(self, &args.out[0], n0, m0, g);
      }
    }
  }
}

// The leader alone: g and u of a chunk, into the set of boxes whose stores have been read.
template <class C>
FUSEDMLP_DEVICE void load_pair(const Arguments& args, const Consumer<C>& self, TileAt tile,
                               int chunk) {
  tma_store_wait_read<0>();
  const int set = chunk % 2;
  const Corner box = box_of<C>(tile, chunk);
  uint64_t* loaded = &self.shared.loaded[self.group][set];
  barrier_expect(loaded, (C::GATED ? 2 : 1) * kBoxBytes);
  tma_load(self.shared.boxes[self.group][3 * set], &args.in[0], loaded, box.n, box.m, 0);
  if (C::GATED) {
    tma_load(self.shared.boxes[self.group][3 * set + 1], &args.in[1], loaded, box.n, box.m, 0);
  }
}

// Sums over a warp's 16 rows, one float2 a lane: v[j] holds columns 8 j + 2 (lane % 4) and the next,
// of two rows already added. Each step halves what a lane still carries.
FUSEDMLP_DEVICE float2 sum_rows(float2 (&v)[8], int lane) {
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
    const bool upper = lane & 4 * half;
#pragma unroll
    for (int j = 0; j < half; ++j) {
      const float2 send = upper ? v[j] : v[j + half], keep = upper ? v[j + half] : v[j];
      v[j].x = keep.x + __shfl_xor_sync(0xffffffff, send.x, 4 * half);
      v[j].y = keep.y + __shfl_xor_sync(0xffffffff, send.y, 4 * half);
    }
  }
  return v[0];
}

template <class C>
FUSEDMLP_DEVICE void store_sums(const Arguments& args, const Consumer<C>& self, Corner box,
                                int half, float2 (&v)[8]) {
  const float2 sum = sum_rows(v, self.lane);
  const int64_t row = box.m / GatedLinearBwd::kSumRows + self.warp;
  const int64_t rows = Schedule::ceil_div(args.M, GatedLinearBwd::kSumRows);
  const int64_t n = box.n + 2 * self.lane;  // lane 4 j + c has columns 8 j + 2 c and the next
  if (row < rows && n < args.H) {
    *reinterpret_cast<float2*>(args.sums + (half * rows + row) * args.H + n) = sum;
  }
}

// One chunk of the backward: dh from registers, g and u from shared memory; dg and du take their
// place there.
template <class C>
FUSEDMLP_DEVICE void finish_chunk(const Arguments& args, const Consumer<C>& self, Corner box,
                                  int set, const float* dh) {
  unsigned char* at = self.shared.boxes[self.group][3 * set];
  float2 sums_g[8] = {}, sums_u[8] = {};
  with_activation<C::GATED>(args.activation, args.scalars, [&](auto act) {
#pragma unroll
    for (int column = 0; column < kBox / 16; ++column) {
      float g[8], u[8] = {}, h[8];
      take(self, at, column, g);
      if (C::GATED) take(self, at + kBoxBytes, column, u);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const Gradients d = backward_of<C::GATED>(act, dh[8 * column + e], g[e], u[e]);
        g[e] = d.dg, u[e] = d.du, h[e] = d.h;
        float2 &of_g = sums_g[2 * column + e / 4], &of_u = sums_u[2 * column + e / 4];
        (e % 2 ? of_g.y : of_g.x) += d.dg;
        (e % 2 ? of_u.y : of_u.x) += d.du;
      }
      put(self, at, column, g);
      if (C::GATED) put(self, at + kBoxBytes, column, u);
      if (args.store_h) put(self, at + 2 * kBoxBytes, column, h);
    }
  });
  if (args.sums != nullptr) {
    store_sums(args, self, box, 0, sums_g);
    if (C::GATED) store_sums(args, self, box, 1, sums_u);
  }
  fence_async_shared();
  self.sync();
  if (self.leads()) {
    tma_store(&args.out[1], at, box.n, box.m, 0);
    if (C::GATED) tma_store(&args.out[2], at + kBoxBytes, box.n, box.m, 0);
    if (args.store_h) tma_store(&args.out[0], at + 2 * kBoxBytes, box.n, box.m, 0);
    tma_store_commit();
  }
}

template <class C>
FUSEDMLP_DEVICE void finish_backward(const Arguments& args, const Consumer<C>& self, TileAt tile,
                                     float (&acc)[C::ROW_BLOCKS][C::BN / 2]) {
#pragma unroll
  for (int chunk = 0; chunk < C::CHUNKS; ++chunk) {
    constexpr int ACROSS = C::COLUMNS / kBox;
    const int set = chunk % 2;
    barrier_wait(&self.shared.loaded[self.group][set], chunk / 2 % 2);
    finish_chunk(args, self, box_of<C>(tile, chunk), set,
                 &acc[chunk / ACROSS][chunk % ACROSS * 32]);
    if (self.leads() && chunk + 2 < C::CHUNKS) load_pair(args, self, tile, chunk + 2);
  }
}

template <class C>
FUSEDMLP_DEVICE void consume(const Arguments& args, Shared<C>& shared, int rank) {
  const Schedule& schedule = args.schedule;
  Consumer<C> self(shared);
  const int blocks = gridDim.x / schedule.cluster;
  int index = blockIdx.x / schedule.cluster;
  Ring<C::STAGES> ring;
  uint32_t turn = 1;  // the first consumer's first turn needs no other before it
  if (C::PINGPONG && self.group == 1) {
    index += blocks;
    ring.skip(args.k_steps);
    turn = 0;
  }
  for (; index < schedule.tiles(); index += (C::PINGPONG ? 2 : 1) * blocks) {
    const TileAt tile = schedule.at(index, rank);
    float acc[C::ROW_BLOCKS][C::BN / 2];
    if constexpr (C::BACKWARD) {
      if (self.leads()) {
        load_pair(args, self, tile, 0);
        load_pair(args, self, tile, 1);
      }
      multiply(args, self, ring, turn, acc);
      finish_backward(args, self, tile, acc);
    } else {
      multiply(args, self, ring, turn, acc);
      finish_forward(args, self, tile, acc);
    }
    if (C::PINGPONG) ring.skip(args.k_steps);
    turn ^= 1;
  }
  if (self.leads()) tma_store_wait_read<0>();  // shared memory must outlive its readers
}

template <class C>
__global__ void __launch_bounds__(kThreads, 1) gemm(const __grid_constant__ Arguments args) {
  Shared<C>& shared = *dynamic_shared<Shared<C>>();
  const int cluster = args.schedule.cluster;
  const int rank = cluster == 1 ? 0 : cluster_rank();
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < C::STAGES; ++stage) {
      barrier_init(&shared.full[stage], 1);
      barrier_init(&shared.empty[stage], 4 * C::CONSUMERS * cluster);  // every warp that reads it
    }
    for (int i = 0; i < 4; ++i) barrier_init(&shared.loaded[i / 2][i % 2], 1);
    for (uint64_t& turn : shared.turn) barrier_init(&turn, 4);  // every warp of the other consumer
    barrier_init_fence();
    prefetch(&args.a);
    prefetch(&args.b[0]);
    if (C::GATED && !C::BACKWARD) prefetch(&args.b[1]);
  }
  // No block may reach into another's shared memory before its barriers are there.
  __syncthreads();
  cluster_arrive();
  cluster_wait();
  if (threadIdx.x < kWarpGroup) {
    registers_give<40>();
    if (threadIdx.x == 0) produce<C>(args, shared, rank);
    __syncwarp();
  } else {
    registers_take<232>();
    consume<C>(args, shared, rank);
    __syncwarp();
  }
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
const char* enqueue(const Params& p, bool gated, const Variant* table_row, void* stream) {
  constexpr bool BACKWARD = std::is_same_v<Params, GatedLinearBwd>;
  if (table_row == nullptr) return "no such variant";
  const bool pingpong = table_row->pingpong;
  const int cluster = table_row->cluster;
  // Before any descriptor is made: the driver makes none on a thread without a context.
  if (const char* error = error_text(use_device(p.device))) return error;
  Arguments args;
  if (const char* error = arguments_of(p, pingpong ? 128 : 256, cluster, kBoxRows, false, &args)) {
    return error;
  }
  if constexpr (!BACKWARD) {
    if (!pingpong) {
      return (gated ? launch_gemm<Config<T, true, false, false>, Params>
                    : launch_gemm<Config<T, false, false, false>, Params>)(args, p, stream);
    }
  }
  return (gated ? launch_gemm<Config<T, true, BACKWARD, true>, Params>
                : launch_gemm<Config<T, false, BACKWARD, true>, Params>)(args, p, stream);
}

}  // namespace

const char* gated_linear_fwd_sm90(const GatedLinearFwd& p, void* stream) {
  const auto run = p.dtype == Dtype::bf16 ? enqueue<__nv_bfloat16, GatedLinearFwd>
                                          : enqueue<__half, GatedLinearFwd>;
  return run(p, p.w_up != nullptr, pick(kFwdSm90, p), stream);
}

const char* gated_linear_bwd_sm90(const GatedLinearBwd& p, void* stream) {
  const auto run = p.dtype == Dtype::bf16 ? enqueue<__nv_bfloat16, GatedLinearBwd>
                                          : enqueue<__half, GatedLinearBwd>;
  return run(p, p.u != nullptr, pick(kBwdSm90, p), stream);
}

}  // namespace fusedmlp
