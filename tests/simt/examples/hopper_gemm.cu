// C (M, N) = A (M, K) B: TMA into a ring of stages, wgmma, and out by TMA; tiles of 64 x 128. B is
// (N, K), K-major, or (K, N), MN-major. In a cluster of two, whose blocks take tiles one above the
// other, each block loads half of B's tile for both. `fault` breaks one rule of the choreography.
#include "device.cuh"
#include "hopper.cuh"

using namespace fusedmlp;

enum Fault : int {
  NONE,
  NO_FULL_WAIT,         // the consumer does not wait for a stage
  NO_EMPTY_WAIT,        // the producer does not wait for it to be read
  EARLY_RELEASE,        // a stage is given back before its product is done
  NO_WGMMA_WAIT,        // accumulators are read while their products run
  NO_WGMMA_FENCE,       //
  WRONG_PARITY,         // the producer's first wait is for the wrong phase
  PHASE_AHEAD,          // the consumer takes a stage before its first phase
  SHORT_EXPECT,         // fewer bytes are announced than come
  NO_INIT_FENCE,        // TMA meets barriers that were not made visible to it
  DOUBLE_INIT,          //
  OVERWRITTEN_BARRIER,  //
  WRONG_DESCRIPTOR,     // rows of 8 at the wrong stride
  UNALIGNED_DESCRIPTOR, // an operand that begins inside a swizzle's pattern
  NO_STORE_FENCE,       // no fence_async_shared before the store
  EARLY_STAGING,        // the staged box is written while its store reads it
  NO_STORE_WAIT,        // the block finishes while a store reads its shared memory
  NO_CLUSTER_END,       // a block finishes while the other reaches into it
};

constexpr int BM = 64, BN = 128, BK = 64, STAGES = 2;
constexpr int A_BYTES = BM * BK * 2, B_HALF = BN / 2 * BK * 2;

struct Shared {
  alignas(1024) unsigned char a[STAGES][A_BYTES];
  unsigned char b[STAGES][2 * B_HALF];
  unsigned char box[BM * 128];
  uint64_t full[STAGES], empty[STAGES];
};

struct Arguments {
  TensorMap a, b, c;
  int k_steps, fault;
};

template <bool B_MN_MAJOR>
__device__ void produce(const Arguments& args, Shared& shared, int m0, int n0) {
  const uint32_t cluster = cluster_size(), rank = cluster_rank();
  for (int k = 0; k < args.k_steps; ++k) {
    const int s = k % STAGES;
    const uint32_t parity = k / STAGES % 2 ^ (args.fault != WRONG_PARITY);
    if (args.fault != NO_EMPTY_WAIT) barrier_wait(&shared.empty[s], parity);
    const int missing = args.fault == SHORT_EXPECT ? 128 : 0;
    barrier_expect(&shared.full[s], A_BYTES + 2 * B_HALF - missing);
    tma_load(shared.a[s], &args.a, &shared.full[s], k * BK, m0, 0);
    for (uint32_t half = rank; half < 2; half += cluster) {
      const int n = n0 + half * BN / 2;
      tma_load(shared.b[s] + half * B_HALF, &args.b, &shared.full[s], B_MN_MAJOR ? n : k * BK,
               B_MN_MAJOR ? k * BK : n, 0, uint16_t((1 << cluster) - 1));
    }
  }
}

template <bool B_MN_MAJOR>
__device__ void multiply(const Arguments& args, Shared& shared, float (&acc)[BN / 2]) {
  const int fault = args.fault;
  for (int k = 0; k < args.k_steps; ++k) {
    const int s = k % STAGES;
    const uint32_t parity = k / STAGES % 2 ^ (fault == PHASE_AHEAD);
    if (fault != NO_FULL_WAIT) barrier_wait(&shared.full[s], parity);
    if (fault != NO_WGMMA_FENCE) wgmma_fence();
    for (int kk = 0; kk < BK / 16; ++kk) {
      const unsigned char* a = shared.a[s] + 32 * kk + (fault == UNALIGNED_DESCRIPTOR ? 128 : 0);
      const unsigned char* b = shared.b[s] + kk * (B_MN_MAJOR ? 16 * 128 : 32);
      wgmma<__nv_bfloat16, BN, B_MN_MAJOR>(
          acc, matrix_descriptor(a, 0, fault == WRONG_DESCRIPTOR ? 512 : 1024),
          matrix_descriptor(b, B_HALF, 1024), k + kk > 0);
    }
    wgmma_commit();
    const auto release = [&] {
      if (threadIdx.x % 128 < cluster_size()) barrier_arrive(&shared.empty[s], threadIdx.x % 128);
    };
    if (fault == EARLY_RELEASE) release();
    if (fault != NO_WGMMA_WAIT) wgmma_wait<0>();
    if (fault != EARLY_RELEASE) release();
  }
  wgmma_result(acc);
}

__device__ void store(const Arguments& args, Shared& shared, int m0, int n0,
                      const float (&acc)[BN / 2]) {
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  for (int half = 0; half < 2; ++half) {
    if (args.fault != EARLY_STAGING && thread == 0) tma_store_wait_read<0>();
    named_sync(1, 128);
    for (int column = 0; column < 4; ++column) {
      const int row = 16 * warp + lane % 16, chunk = 2 * column + lane / 16;
      uint32_t packed[4];
      for (int i = 0; i < 4; ++i) {
        const float* v = &acc[32 * half + 8 * column + 2 * i];
        const __nv_bfloat162 both = __floats2bfloat162_rn(v[0], v[1]);
        memcpy(&packed[i], &both, 4);
      }
      stmatrix_x4(shared.box + 128 * row + 16 * (chunk ^ row % 8), packed[0], packed[1], packed[2],
                  packed[3]);
    }
    if (args.fault != NO_STORE_FENCE) fence_async_shared();
    named_sync(1, 128);
    if (thread == 0) {
      tma_store(&args.c, shared.box, n0 + 64 * half, m0, 0);
      tma_store_commit();
    }
  }
  if (args.fault != NO_STORE_WAIT && thread == 0) tma_store_wait_read<0>();
}

template <bool B_MN_MAJOR>
__global__ void __launch_bounds__(256) hopper_gemm(const __grid_constant__ Arguments args) {
  Shared& shared = *dynamic_shared<Shared>();
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) {
      barrier_init(&shared.full[s], 1);
      barrier_init(&shared.empty[s], cluster_size());
    }
    if (args.fault == DOUBLE_INIT) barrier_init(&shared.full[0], 1);
    if (args.fault == OVERWRITTEN_BARRIER) shared.full[0] = 0;
    if (args.fault != NO_INIT_FENCE) barrier_init_fence();
  }
  __syncthreads();
  cluster_arrive();
  cluster_wait();
  const int m0 = blockIdx.x * BM, n0 = blockIdx.y * BN;
  if (threadIdx.x < 128) {
    if (threadIdx.x == 0) produce<B_MN_MAJOR>(args, shared, m0, n0);
  } else {
    float acc[BN / 2];
    multiply<B_MN_MAJOR>(args, shared, acc);
    store(args, shared, m0, n0, acc);
  }
  __syncwarp();
  if (args.fault == NO_CLUSTER_END) return;
  cluster_arrive();
  cluster_wait();
}

extern "C" int run_hopper_gemm(const void* a, const void* b, void* c, int M, int N, int K,
                               bool b_mn_major, int cluster, int fault) {
  Arguments args;
  args.k_steps = (K + BK - 1) / BK;
  args.fault = fault;
  const auto encode = [](TensorMap* map, const void* base, int rows, int columns, int box_rows) {
    const uint64_t size[] = {uint64_t(columns), uint64_t(rows), 1};
    const uint64_t stride[] = {uint64_t(columns), uint64_t(columns) * rows};
    const uint32_t box[] = {64, uint32_t(box_rows), 1};
    return encode_tensor_map(map, base, size, stride, box, true) == 0;
  };
  const bool encoded = encode(&args.a, a, M, K, BM) && encode(&args.c, c, M, N, BM) &&
                       (b_mn_major ? encode(&args.b, b, K, N, BK) : encode(&args.b, b, N, K, 64));
  if (!encoded) return cudaErrorInvalidValue;
  const int rows = (M + BM * cluster - 1) / (BM * cluster) * cluster;
  return launch_clusters(dim3(cluster), b_mn_major ? hopper_gemm<true> : hopper_gemm<false>,
                         dim3(rows, (N + BN - 1) / BN), dim3(256), sizeof(Shared), nullptr, args);
}
