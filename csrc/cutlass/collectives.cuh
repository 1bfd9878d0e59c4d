// act(x w' + b) and phi(x wg' + bg) psi(x wu' + bu) by CUTLASS's collectives: what both architectures share.
// Only CUTLASS's headers are used; the arithmetic of an element is csrc's own.
//
// Gate and up are one product. Its columns are 32 of w_gate, the same 32 of w_up, the next 32 of w_gate, and
// so on, by strides alone: the mode N of the weights is ((32, 2), H / 32), and the stride of its mode of two
// is the distance from the one that lies lower in memory to the other, wherever they are. So the 64 columns of an epilogue's tile
// hold 32 of g and the same 32 of u, each pair in one thread's registers, and the epilogue goes on with two
// halves of 32 columns, which are tiles of plain (M, H) matrices again.
#pragma once

#include <cute/tensor.hpp>
#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "../device.cuh"
#include "../epilogue.cuh"
#include "cutlass.h"

namespace fusedmlp::by_cutlass {

using cute::_0;
using cute::_1;
using cute::_2;
using cute::Int;
using cute::Shape;
using cute::Stride;
namespace fusion = cutlass::epilogue::fusion;

inline constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;

struct Act {
  int number;
  float scalars[3];
  bool up_first;  // a fragment's first half is of u
};

// h = act(z), for a fragment. The activation is chosen at run time, by one branch for a fragment of 32 or 64
// elements: as a template argument it would make sixteen kernels of every one.
template <class Fragment>
struct Activate {
  using Arguments = Act;

  CUTLASS_DEVICE Fragment operator()(const Fragment& z, const Act& act) const {
    Fragment h;
    with_activation<false>(act.number, act.scalars, [&](const auto& f) {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < Fragment::kElements; ++i) h[i] = forward_of<false>(f, z[i], 0.f);
    });
    return h;
  }
};

// h = phi(g) psi(u), of a fragment's halves
template <class Fragment>
struct Gate {
  using Arguments = Act;

  CUTLASS_DEVICE Fragment operator()(const Fragment& first, const Fragment& second, const Act& act) const {
    Fragment g, u, h;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < Fragment::kElements; ++i) {
      g[i] = act.up_first ? second[i] : first[i];
      u[i] = act.up_first ? first[i] : second[i];
    }
    with_activation<true>(act.number, act.scalars, [&](const auto& f) {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < Fragment::kElements; ++i) h[i] = forward_of<true>(f, g[i], u[i]);
    });
    return h;
  }
};

// The trees of CUTLASS's epilogue. TILE: of the block, in columns of z, g or u; COLUMNS: of the epilogue's
// tile. A matrix whose address is null is not stored, a bias whose address is null is 0.
template <class Element, class Tile, class Part, int STAGES, class Store>
struct Trees {
  using Matrix = Stride<int64_t, _1, _0>;
  using Atom = cute::conditional_t<cute::size<1>(Part{}) == 64, cute::GMMA::Layout_K_SW128_Atom<Element>,
                                   cute::GMMA::Layout_K_SW64_Atom<Element>>;
  using Keep = fusion::Sm90AuxStore<STAGES, Part, Element, kRound, Matrix, Atom, Store>;
  using Bias = fusion::Sm90RowBroadcast<0, Tile, Element, float, Stride<_0, _1, _0>>;
  using Plus = fusion::Sm90Compute<cutlass::plus, float, float, kRound>;
  // z = acc + b, stored
  using Biased = fusion::Sm90EVT<Keep, fusion::Sm90EVT<Plus, fusion::Sm90AccFetch, Bias>>;
  // h = act(z), and stored
  using Activated = fusion::Sm90EVT<fusion::Sm90Compute<Activate, Element, float, kRound>, Biased>;
  using Plain = fusion::Sm90EVT<Keep, Activated>;
  using Gated = fusion::Sm90Compute<Gate, float, float, kRound>;
};

// Whether a thread's part of two halves side by side is its part of the one, then that of the other.
template <class Both, class Half>
constexpr bool in_halves(Both both, Half half) {
  const int size = cute::size(half);
  const auto origin = cute::make_arithmetic_tuple(0, 0);
  for (int i = 0; i < size; ++i) {
    const auto first = origin + both(i), second = origin + both(i + size), one = origin + half(i);
    const int row = cute::get<0>(one), column = cute::get<1>(one);
    if (cute::get<0>(first) != row || cute::get<0>(second) != row) return false;
    if (cute::get<1>(first) != column || cute::get<1>(second) != column + kGroup) return false;
  }
  return cute::size(both) == 2 * size;
}

// Keeps a product's extents, for an epilogue that is told others (WithoutDestination).
struct Extents : fusion::Sm90VisitorImpl<> {
  struct Params {
    int M, N;
  };

  Extents() = default;
  CUTLASS_HOST_DEVICE Extents(const Params& kept, const SharedStorage&) : params(kept) {}

  template <class Problem>
  static constexpr Params to_underlying_arguments(const Problem& problem, const Arguments&, void*) {
    return {cute::get<0>(problem), cute::get<1>(problem)};
  }

  Params params;
};

// The epilogue of a pair: the trees of g and of u on the two halves of a fragment, then the gate, then h's
// store. Each of them sees a product of H columns in blocks of half the width. COPY: which thread has what of
// a half; void: as the collective's own copy has it.
template <class Trees, class Element, class Tile, class Part, class Copy = void>
struct PairEpilogue
    : fusion::Sm90VisitorImpl<typename Trees::Biased, typename Trees::Biased, typename Trees::Gated,
                              typename Trees::Keep, Extents> {
  using Base = fusion::Sm90VisitorImpl<typename Trees::Biased, typename Trees::Biased,
                                       typename Trees::Gated, typename Trees::Keep, Extents>;
  using Base::Base;
  using ElementAux = Element;  // what the collective sizes its tiles by

  template <class Problem>
  static constexpr auto to_underlying_arguments(const Problem& problem,
                                                const typename Base::Arguments& args, void* workspace) {
    auto [M, N, K, L] = cute::append<4>(problem, 1);
    return Base::to_underlying_arguments(cute::make_shape(M, N / 2, K, L), args, workspace);
  }

  template <class Callbacks>
  struct OfHalves : Callbacks {
    using Callbacks::callbacks_tuple;

    template <class Accumulator, int SIZE>
    CUTLASS_DEVICE auto visit(const cutlass::Array<Accumulator, SIZE>& both, int v, int m, int n) {
      cutlass::Array<Accumulator, SIZE / 2> gate, up;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < SIZE / 2; ++i) {
        gate[i] = both[i];
        up[i] = both[i + SIZE / 2];
      }
      auto g = cute::get<0>(callbacks_tuple).visit(gate, v, m, n);
      auto u = cute::get<1>(callbacks_tuple).visit(up, v, m, n);
      auto h = cute::get<2>(callbacks_tuple).visit(gate, v, m, n, g, u);
      cute::get<3>(callbacks_tuple).visit(gate, v, m, n, h);
      return cutlass::Array<Element, SIZE>{};  // for the collective, which stores nothing itself
    }
  };

  template <bool FROM_SOURCE, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(const fusion::detail::ConsumerStoreArgs<Args...>& args) {
    const auto& extents = cute::get<4>(this->ops).params;
    const auto problem = cute::make_shape(extents.M, extents.N, cute::get<2>(args.problem_shape_mnkl), 1);
    const auto [m, n, k, l] = args.tile_coord_mnkl;
    auto where = cute::local_tile(
        cute::make_identity_tensor(cute::take<0, 2>(problem)), cute::take<0, 2>(Tile{}), cute::make_coord(m, n));
    const auto copy = [&] {
      if constexpr (cute::is_void_v<Copy>) {
        return args.tiled_copy;
      } else {
        return Copy{};
      }
    }();
    auto mine = fusion::sm90_partition_for_epilogue<FROM_SOURCE>(where, Part{}, copy, args.thread_idx);
    using Both = decltype(args.tCcD(cute::_, cute::_, cute::_, _0{}, _0{}).layout());
    using Mine = decltype(mine(cute::_, cute::_, cute::_, _0{}, _0{}).layout());
    static_assert(in_halves(Both{}, Mine{}), "a fragment is not 32 columns of g, then those of u");
    const fusion::detail::ConsumerStoreArgs of_half(
        problem, Tile{}, args.tile_coord_mnkl, args.tiled_mma, Part{}, copy,
        cute::make_coord_tensor(where.layout()), cute::take<0, 2>(problem) - where(_0{}),
        cute::make_coord_tensor(mine.layout()), cute::take<0, 2>(problem) - mine(_0{}), args.tCrC,
        args.thread_idx);
    auto callbacks = Base::template get_consumer_store_callbacks<FROM_SOURCE>(of_half);
    return OfHalves<decltype(callbacks)>{callbacks};
  }
};

using RowStride = Stride<int64_t, _1, int64_t>;
template <bool GATED>
using WeightStride =
    cute::conditional_t<GATED, Stride<Stride<Stride<int64_t, int64_t>, int64_t>, _1, int64_t>, RowStride>;

// A tile for the mainloop: with a gate, its N is nested as the weights' is.
template <bool GATED, class Tile>
using WeightTile = cute::conditional_t<
    GATED,
    Shape<decltype(cute::size<0>(Tile{})),
          Shape<Shape<Int<kGroup>, _2>, Int<decltype(cute::size<1>(Tile{}))::value / (2 * kGroup)>>,
          decltype(cute::size<2>(Tile{}))>,
    Tile>;

// sm_100's epilogue without shared memory, which must have a destination, made to store none: it believes
// that the product has no rows. Its tree stores instead.
template <class Epilogue>
struct WithoutDestination : Epilogue {
  using Epilogue::Epilogue;

  template <bool REUSE, class A, class B, class C, class D, class E, class F, class Problem, class... Rest>
  CUTLASS_DEVICE auto store(A a, B b, C c, D d, E e, F f, const Problem& problem, Rest&&... rest) {
    const auto none = cute::make_shape(0, cute::get<1>(problem), cute::get<2>(problem), cute::get<3>(problem));
    return Epilogue::template store<REUSE>(a, b, c, d, e, f, none, rest...);
  }
};

// The mainloop of a pair: CUTLASS's, which sees the weights' mode N as ((32, 2), H / 32), under the face of a
// product of 2 H columns. FLAT: its tile as others see it.
template <class Mainloop, class Flat>
struct PairMainloop : Mainloop {
  using Mainloop::Mainloop;
  using TileShape = Flat;
  using CtaShape_MNK = Flat;  // of a product of one multiprocessor

  template <class Problem>
  static CUTLASS_HOST_DEVICE auto nested(const Problem& problem) {
    auto [M, N, K, L] = cute::append<4>(problem, 1);
    return cute::make_shape(M, cute::make_shape(cute::make_shape(kGroup, 2), N / (2 * kGroup)), K, L);
  }

  template <class Problem, class... Rest>
  static constexpr auto to_underlying_arguments(const Problem& problem, Rest&&... rest) {
    return Mainloop::to_underlying_arguments(nested(problem), rest...);
  }
  template <class Problem, class... Rest>
  static bool can_implement(const Problem& problem, Rest&&... rest) {
    return Mainloop::can_implement(nested(problem), rest...);
  }
  // The weights' tiles are (N, K, n, k, l); n is ((1, 1), n) for the mainloop and n for the others.
  template <class Problem, class... Rest>
  CUTLASS_DEVICE auto load_init(const Problem& problem, Rest&&... rest) const {
    auto inputs = Mainloop::load_init(nested(problem), rest...);
    if constexpr (!cute::is_tuple<decltype(inputs)>::value) {
      return inputs;  // sm_100's, whose scheduler gives n itself
    } else {
      auto tiles = cute::get<1>(inputs);
      auto flat = cute::make_layout(cute::layout<0>(tiles), cute::layout<1>(tiles), cute::layout<2, 1>(tiles),
                                    cute::layout<3>(tiles), cute::layout<4>(tiles));
      return cute::make_tuple(cute::get<0>(inputs), cute::make_tensor(tiles.data(), flat));
    }
  }
};

// A kernel behind GatedLinearFwd. PARTS: what its file names: Kernel, Trees, Element, and whether the
// collective itself stores act(z), which then is always wanted.
template <class Parts, bool GATED>
struct Launch {
  using Element = typename Parts::Element;
  using Kernel = typename Parts::Kernel;
  using Trees = typename Parts::Trees;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static Element* at(const void* address) { return static_cast<Element*>(const_cast<void*>(address)); }

  static typename Gemm::Arguments arguments(const GatedLinearFwd& p) {
    const int M = static_cast<int>(p.M), H = static_cast<int>(p.H), D = static_cast<int>(p.D);
    const bool up_first = GATED && p.w_up < p.w_gate;
    const Act act{p.activation, {p.scalars[0], p.scalars[1], p.scalars[2]}, up_first};
    const typename Trees::Matrix like_h{p.stride_h, {}, {}}, like_z{p.stride_gu, {}, {}};
    const auto biased = [&](const void* bias, void* z) {
      return typename Trees::Biased::Arguments{{{}, {at(bias), Element(0), {}}, {}}, {at(z), like_z}};
    };
    typename Gemm::Arguments args{};
    args.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    args.problem_shape = cute::make_shape(M, GATED ? 2 * H : H, D, 1);
    args.hw_info.device_id = p.device;
    args.hw_info.sm_count = p.multiprocessors;
    args.mainloop.ptr_A = at(p.x);
    args.mainloop.dA = {p.stride_x, {}, 0};
    args.mainloop.ptr_B = at(up_first ? p.w_up : p.w_gate);
    if constexpr (GATED) {
      const int64_t apart = up_first ? at(p.w_gate) - at(p.w_up) : at(p.w_up) - at(p.w_gate);
      args.mainloop.dB = {{{p.stride_gate, apart}, kGroup * p.stride_gate}, {}, 0};
      const auto g = biased(p.b_gate, p.g), u = biased(p.b_up, p.u);
      args.epilogue.thread = {up_first ? u : g, up_first ? g : u, act, {at(p.h), like_h}, {}};
    } else if constexpr (Parts::kStoresH) {
      args.mainloop.dB = {p.stride_gate, {}, 0};
      args.epilogue.thread = {biased(p.b_gate, p.g), act};
      args.epilogue.ptr_D = at(p.h);
      args.epilogue.dD = {p.stride_h, {}, 0};
    } else {
      args.mainloop.dB = {p.stride_gate, {}, 0};
      args.epilogue.thread = {{biased(p.b_gate, p.g), act}, {at(p.h), like_h}};
    }
    return args;
  }

  static const char* run(const GatedLinearFwd& p, void* stream) {
    if (const cudaError_t error = use_device(p.device)) {
      cudaGetLastError();  // none stays behind
      return error_text(error);
    }
    const auto args = arguments(p);
    if (const auto status = Gemm::can_implement(args); status != cutlass::Status::kSuccess) {
      return cutlass::cutlassGetStatusString(status);
    }
    // The schedulers are static and split no K.
    if (Gemm::get_workspace_size(args) != 0) return "CUTLASS asks for a workspace";
    Gemm gemm;
    const auto on = static_cast<cudaStream_t>(stream);
    auto status = gemm.initialize(args, nullptr, on);
    if (status == cutlass::Status::kSuccess) status = gemm.run(on);
    if (status == cutlass::Status::kSuccess) return nullptr;
    const cudaError_t error = cudaGetLastError();
    return error != cudaSuccess ? error_text(error) : cutlass::cutlassGetStatusString(status);
  }
};

// The one of a call: by its dtype, and by whether it has a gate.
template <template <class Element, bool GATED> class Parts>
const char* enqueue(const GatedLinearFwd& p, void* stream) {
  const auto of = [&](auto gated) {
    constexpr bool kGated = decltype(gated)::value;
    return p.dtype == Dtype::bf16 ? Launch<Parts<cutlass::bfloat16_t, kGated>, kGated>::run(p, stream)
                                  : Launch<Parts<cutlass::half_t, kGated>, kGated>::run(p, stream);
  };
  return p.w_up != nullptr ? of(cute::true_type{}) : of(cute::false_type{});
}

}  // namespace fusedmlp::by_cutlass
