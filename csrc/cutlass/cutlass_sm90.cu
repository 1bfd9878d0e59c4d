// By TMA and wgmma, on Hopper: CUTLASS's cooperative schedule, 128 x 256 tiles, clusters of two blocks that
// share the tiles of weights.
#include "collectives.cuh"

namespace fusedmlp::by_cutlass {
namespace {

template <class T, bool GATED>
struct Sm90 {
  using Element = T;
  [[maybe_unused]] static constexpr bool kStoresH = false;
  using Cluster = Shape<_2, _1, _1>;
  using Tile = Shape<Int<128>, Int<256>, Int<64>>;
  using HalfTile = Shape<Int<128>, Int<128>, Int<64>>;
  using Part = Shape<Int<128>, Int<kGroup>>;                     // of z, g, u or h
  using Both = Shape<Int<128>, Int<GATED ? 2 * kGroup : kGroup>>;  // of the accumulators
  using Own = cute::conditional_t<GATED, HalfTile, Tile>;
  using Trees = by_cutlass::Trees<Element, Own, Part, 2, cute::SM90_U32x4_STSM_N>;
  using Fusion = cute::conditional_t<GATED, PairEpilogue<Trees, Element, Own, Part>, typename Trees::Plain>;
  using Row = cutlass::layout::RowMajor;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster, Both, float, float, void, Row, 8,
      void, Row, 8, cutlass::epilogue::TmaWarpSpecializedCooperative, Fusion>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, RowStride, 8, Element, WeightStride<GATED>,
      8, float, WeightTile<GATED, Tile>, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename Epilogue::SharedStorage))>,
      cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<
      Shape<int, int, int, int>,
      cute::conditional_t<GATED, PairMainloop<Mainloop, Tile>, Mainloop>, Epilogue,
      cutlass::gemm::PersistentScheduler>;
};

}  // namespace

const char* fwd_sm90(const GatedLinearFwd& p, void* stream) { return enqueue<Sm90>(p, stream); }

}  // namespace fusedmlp::by_cutlass
