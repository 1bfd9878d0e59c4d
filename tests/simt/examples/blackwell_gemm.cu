// C (M, N) = A (M, K) B, float32 out: TMA into a ring of stages, tcgen05 into tensor memory, out by
// plain stores; tiles of 128 x 128. B is (N, K), K-major, or (K, N), MN-major. In a cluster of two
// each block loads half of B's tile for both. `fault` breaks one rule of the choreography.
#include "blackwell.cuh"
#include "device.cuh"

using namespace fusedmlp;

enum Fault : int {
  NONE,
  NO_FULL_WAIT,       // products of a stage that is not there yet
  EARLY_RELEASE,      // a stage is given back before its products are done
  NO_READY_WAIT,      // the accumulator is read while its products run
  NO_FENCE_AFTER,     // no tcgen05_fence_after the wait for the accumulator
  NO_LOAD_WAIT,       // registers are read while tmem_load fills them
  WRONG_LANES,        // a warp reads another's lanes
  WRONG_SHAPE,        // products wider than what is allocated
  WRONG_DESCRIPTOR,   // Hopper's format
  NO_FREE,            //
  WRONG_FREE,         // of other columns
  ALLOC_AFTER_PERMIT, //
};

constexpr int BM = 128, BN = 128, BK = 64, STAGES = 2, COLUMNS = 128;
constexpr int A_BYTES = BM * BK * 2, B_HALF = BN / 2 * BK * 2;

struct Shared {
  alignas(1024) unsigned char a[STAGES][A_BYTES];
  unsigned char b[STAGES][2 * B_HALF];
  uint64_t full[STAGES], empty[STAGES], ready;
  uint32_t tmem;
};

struct Arguments {
  TensorMap a, b;
  float* c;
  int M, N, k_steps, fault;
};

template <bool B_MN_MAJOR>
__device__ void produce(const Arguments& args, Shared& shared, int m0, int n0) {
  const uint32_t cluster = cluster_size(), rank = cluster_rank();
  for (int k = 0; k < args.k_steps; ++k) {
    const int s = k % STAGES;
    barrier_wait(&shared.empty[s], k / STAGES % 2 ^ 1);
    barrier_expect(&shared.full[s], A_BYTES + 2 * B_HALF);
    tma_load(shared.a[s], &args.a, &shared.full[s], k * BK, m0, 0);
    for (uint32_t half = rank; half < 2; half += cluster) {
      const int n = n0 + half * BN / 2;
      tma_load(shared.b[s] + half * B_HALF, &args.b, &shared.full[s], B_MN_MAJOR ? n : k * BK,
               B_MN_MAJOR ? k * BK : n, 0, uint16_t((1 << cluster) - 1));
    }
  }
}

template <bool B_MN_MAJOR>
__device__ void multiply(const Arguments& args, Shared& shared) {
  const int fault = args.fault;
  const uint32_t instruction =
      instruction_descriptor<__nv_bfloat16>(BM, fault == WRONG_SHAPE ? 2 * BN : BN, B_MN_MAJOR);
  const auto mask = uint16_t((1 << cluster_size()) - 1);
  for (int k = 0; k < args.k_steps; ++k) {
    const int s = k % STAGES;
    if (fault != NO_FULL_WAIT) barrier_wait(&shared.full[s], k / STAGES % 2);
    tcgen05_fence_after();
    for (int kk = 0; kk < BK / 16; ++kk) {
      const unsigned char* a = shared.a[s] + 32 * kk;
      const unsigned char* b = shared.b[s] + kk * (B_MN_MAJOR ? 16 * 128 : 32);
      tcgen05_mma(shared.tmem,
                  fault == WRONG_DESCRIPTOR ? matrix_descriptor(a, 0, 1024)
                                            : matrix_descriptor_sm100(a, 0, 1024),
                  matrix_descriptor_sm100(b, B_HALF, 1024), instruction, k + kk > 0);
    }
    if (fault == EARLY_RELEASE) {
      for (uint32_t cta = 0; cta < cluster_size(); ++cta) barrier_arrive(&shared.empty[s], cta);
    } else {
      tcgen05_commit(&shared.empty[s], mask);
    }
  }
  tcgen05_commit(&shared.ready);
}

__device__ void store(const Arguments& args, Shared& shared, int m0, int n0) {
  const int fault = args.fault, warp = threadIdx.x / 32 % 4;
  const int row = m0 + threadIdx.x % 128;
  if (fault != NO_READY_WAIT) barrier_wait(&shared.ready, 0);
  if (fault != NO_FENCE_AFTER) tcgen05_fence_after();
  for (int column = 0; column < BN; column += 32) {
    float values[32];
    tmem_load_x32(values, shared.tmem + ((fault == WRONG_LANES ? 0 : 32u * warp) << 16) + column);
    if (fault != NO_LOAD_WAIT) tmem_load_wait(values);
    for (int i = 0; i < 32; ++i) {
      const int n = n0 + column + i;
      if (row < args.M && n < args.N) args.c[size_t(row) * args.N + n] = values[i];
    }
    if (fault == NO_LOAD_WAIT) tmem_load_wait(values);
  }
}

template <bool B_MN_MAJOR>
__global__ void __launch_bounds__(256) blackwell_gemm(const __grid_constant__ Arguments args) {
  Shared& shared = *dynamic_shared<Shared>();
  const int warp = threadIdx.x / 32;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) {
      barrier_init(&shared.full[s], 1);
      barrier_init(&shared.empty[s], cluster_size());
    }
    barrier_init(&shared.ready, 1);
    barrier_init_fence();
  }
  if (warp == 2) {
    if (args.fault == ALLOC_AFTER_PERMIT) tmem_give_up_permit();
    tmem_alloc(&shared.tmem, COLUMNS);
    tmem_give_up_permit();
  }
  tcgen05_fence_before();
  __syncthreads();
  tcgen05_fence_after();
  cluster_arrive();
  cluster_wait();
  const int m0 = blockIdx.x * BM, n0 = blockIdx.y * BN;
  if (threadIdx.x == 0) {
    produce<B_MN_MAJOR>(args, shared, m0, n0);
  } else if (threadIdx.x == 32) {
    multiply<B_MN_MAJOR>(args, shared);
  } else if (warp >= 4) {
    store(args, shared, m0, n0);
  }
  __syncwarp();
  tcgen05_fence_before();
  __syncthreads();
  tcgen05_fence_after();
  if (warp == 2 && args.fault != NO_FREE) {
    tmem_free(shared.tmem, args.fault == WRONG_FREE ? COLUMNS / 2 : COLUMNS);
  }
  cluster_arrive();
  cluster_wait();
}

extern "C" int run_blackwell_gemm(const void* a, const void* b, float* c, int M, int N, int K,
                                  bool b_mn_major, int cluster, int fault) {
  Arguments args;
  args.c = c, args.M = M, args.N = N;
  args.k_steps = (K + BK - 1) / BK;
  args.fault = fault;
  const auto encode = [](TensorMap* map, const void* base, int rows, int columns, int box_rows) {
    const uint64_t size[] = {uint64_t(columns), uint64_t(rows), 1};
    const uint64_t stride[] = {uint64_t(columns), uint64_t(columns) * rows};
    const uint32_t box[] = {64, uint32_t(box_rows), 1};
    return encode_tensor_map(map, base, size, stride, box, true) == 0;
  };
  const bool encoded = encode(&args.a, a, M, K, BM) &&
                       (b_mn_major ? encode(&args.b, b, K, N, BK) : encode(&args.b, b, N, K, 64));
  if (!encoded) return cudaErrorInvalidValue;
  const int rows = (M + BM * cluster - 1) / (BM * cluster) * cluster;
  return launch_clusters(dim3(cluster), b_mn_major ? blackwell_gemm<true> : blackwell_gemm<false>,
                         dim3(rows, (N + BN - 1) / BN), dim3(256), sizeof(Shared), nullptr, args);
}
