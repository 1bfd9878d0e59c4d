// By TMA, tcgen05 and tensor memory, on data-centre Blackwell: products of one multiprocessor, 128 x 256 tiles,
// clusters of two blocks that share the tiles of weights, and a second accumulator, so that an epilogue runs
// beside the next tile's products. The epilogue stores from registers: CUTLASS 4.2's by TMA has no way to
// store nothing of the accumulators themselves.
#include "collectives.cuh"

namespace fusedmlp::by_cutlass {
namespace {

template <class T, bool GATED>
struct Sm100 {
  using Element = T;
  [[maybe_unused]] static constexpr bool kStoresH = !GATED;
  using Cluster = Shape<_2, _1, _1>;
  using Tile = Shape<Int<128>, Int<256>, Int<64>>;
  using HalfTile = Shape<Int<128>, Int<128>, Int<64>>;
  using Part = Shape<Int<128>, Int<kGroup>>;                     // of z, g, u or h
  using Both = Shape<Int<128>, Int<GATED ? 2 * kGroup : kGroup>>;  // of the accumulators
  using Own = cute::conditional_t<GATED, HalfTile, Tile>;
  using Trees = by_cutlass::Trees<Element, Own, Part, 0, void>;
  // Tensor memory gives each of 128 threads a row.
  using Rows = decltype(cute::make_tiled_copy(cute::Copy_Atom<cute::DefaultCopy, Element>{},
                                              cute::Layout<Shape<Int<128>, _1>>{},
                                              cute::Layout<Shape<_1, Int<kGroup>>>{}));
  using Fusion = cute::conditional_t<GATED, PairEpilogue<Trees, Element, Own, Part, Rows>, typename Trees::Activated>;
  using Row = cutlass::layout::RowMajor;
  using Builder = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm100, cutlass::arch::OpClassTensorOp, Tile, Cluster, Both, float, float, void, Row, 8,
      Element, Row, 8, cutlass::epilogue::NoSmemWarpSpecialized1Sm, Fusion>::CollectiveOp;
  using Epilogue = cute::conditional_t<GATED, WithoutDestination<Builder>, Builder>;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm100, cutlass::arch::OpClassTensorOp, Element, RowStride, 8, Element,
      WeightStride<GATED>, 8, float, WeightTile<GATED, Tile>, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename Epilogue::SharedStorage))>,
      cutlass::gemm::KernelTmaWarpSpecialized1SmSm100>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<
      Shape<int, int, int, int>,
      cute::conditional_t<GATED, PairMainloop<Mainloop, Tile>, Mainloop>, Epilogue,
      cutlass::gemm::StaticPersistentScheduler>;
};

}  // namespace

const char* fwd_sm100(const GatedLinearFwd& p, void* stream) { return enqueue<Sm100>(p, stream); }

}  // namespace fusedmlp::by_cutlass
