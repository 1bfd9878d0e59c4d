// Warp operations: the last lane to arrive computes them for all.
#pragma once
#include "barriers.h"

namespace simt {

// A warp operation from the inside: what each lane has brought, and where its result goes.
template <class In, class Out>
struct Lanes {
  Collective& collective;

  bool has(unsigned lane) const { return lane < 32 && collective.arrived >> lane & 1; }
  unsigned mask() const { return collective.arrived; }
  const In& in(unsigned lane) const { return *static_cast<const In*>(collective.in[lane]); }
  Out& out(unsigned lane) const { return *static_cast<Out*>(collective.out[lane]); }
  Fiber& fiber(unsigned lane) const { return *collective.fibers[lane]; }
  template <class Each>
  void each(Each f) const {
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (has(lane)) f(lane);
    }
  }
};

template <class T>
T undefined() {
  T value;
  std::memset(static_cast<void*>(&value), UNWRITTEN, sizeof value);
  return value;
}

inline std::string collective_state(const void* object) {
  const auto* warp = static_cast<const Warp*>(object);
  std::string text;
  for (const Collective& open : warp->collectives) {
    text += format("%slanes %#x of %#x have arrived", text.empty() ? "" : "; ", open.arrived,
                   open.mask & ~warp->exited);
  }
  return text;
}

inline void finish(Warp& warp, size_t index) {
  Collective collective = warp.collectives[index];
  warp.collectives.erase(warp.collectives.begin() + index);
  collective.complete(collective);
  std::vector<Fiber*> woken;
  for (Fiber* fiber : collective.fibers) {
    if (fiber) woken.push_back(fiber);
  }
  scheduler.wake(woken);
}

inline size_t join(Warp& warp, unsigned mask, const void* kind, const char* what, Site at) {
  for (size_t i = 0; i < warp.collectives.size(); ++i) {
    const Collective& open = warp.collectives[i];
    if (open.mask == mask && open.kind == kind) return i;
    if (open.mask & mask) {
      fail(at, format("%s of lanes %#x while lanes %#x of its warp are at %s of lanes %#x, %s",
                      what, mask, open.arrived, open.what, open.mask, name(open.at).c_str()));
    }
  }
  Collective opened;
  opened.mask = mask;
  opened.kind = kind;
  opened.what = what;
  opened.at = at;
  warp.collectives.push_back(opened);
  return warp.collectives.size() - 1;
}

// f(const Lanes<In, Out>&), which captures nothing, fills every lane's result once all lanes of the
// mask have arrived.
template <class Out, class In, class F>
Out warp_operation(unsigned mask, const char* what, Site at, const In& in, F f) {
  static const char kind = 0;
  Fiber& fiber = self();
  Warp& warp = fiber.block->warps[fiber.warp()];
  if (!(mask >> fiber.lane() & 1)) {
    fail(at, format("%s: the lane is not in its own mask %#x", what, mask));
  }
  Out out = undefined<Out>();
  const size_t index = join(warp, mask, &kind, what, at);
  Collective& mine = warp.collectives[index];
  mine.arrived |= 1u << fiber.lane();
  mine.fibers[fiber.lane()] = &fiber;
  mine.in[fiber.lane()] = &in;
  mine.out[fiber.lane()] = &out;
  mine.body = reinterpret_cast<void (*)()>(static_cast<void (*)(const Lanes<In, Out>&)>(f));
  mine.complete = [](Collective& all) {
    reinterpret_cast<void (*)(const Lanes<In, Out>&)>(all.body)(Lanes<In, Out>{all});
  };
  if (mine.arrived == (mask & ~warp.exited)) {
    finish(warp, index);
    scheduler.take_turn();
  } else {
    scheduler.block({what, at, collective_state, &warp});
  }
  return out;
}

inline void leave_warp(Fiber& fiber) {
  Warp& warp = fiber.block->warps[fiber.warp()];
  warp.exited |= 1u << fiber.lane();
  for (size_t i = warp.collectives.size(); i-- > 0;) {
    const Collective& open = warp.collectives[i];
    if (open.arrived == (open.mask & ~warp.exited)) finish(warp, i);
  }
}

template <class T>
struct Shuffle {
  T value;
  unsigned source;
  bool inside;
};

// A lane whose source is outside its segment keeps its own value; one whose source is not among the
// lanes gets an undefined one.
template <class T>
T shuffle(unsigned mask, const char* what, Site at, T value, int source, bool inside) {
  const Shuffle<T> mine{value, unsigned(source), inside};
  return warp_operation<T>(mask, what, at, mine, [](const Lanes<Shuffle<T>, T>& lanes) {
    lanes.each([&](unsigned lane) {
      const unsigned source = lanes.in(lane).inside ? lanes.in(lane).source : lane;
      if (lanes.has(source)) lanes.out(lane) = lanes.in(source).value;
    });
  });
}

inline int segment(int width, Site at) {
  if (width < 1 || width > 32 || (width & (width - 1))) {
    fail(at, format("the width of a shuffle is a power of two up to 32, got %d", width));
  }
  return int(self().lane()) & ~(width - 1);
}

inline unsigned vote(unsigned mask, const char* what, Site at, int predicate) {
  return warp_operation<unsigned>(mask, what, at, predicate,
                                  [](const Lanes<int, unsigned>& lanes) {
    unsigned ballot = 0;
    lanes.each([&](unsigned lane) { ballot |= unsigned(lanes.in(lane) != 0) << lane; });
    lanes.each([&](unsigned lane) { lanes.out(lane) = ballot; });
  });
}

}  // namespace simt

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              simt::Site at = simt::Site::here()) {
  const int first = simt::segment(width, at);
  return simt::shuffle(mask, "__shfl_sync", at, value, first + (source & (width - 1)), true);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32,
                  simt::Site at = simt::Site::here()) {
  const int last = simt::segment(width, at) + width - 1;
  const int source = int(simt::self().lane()) ^ bits;
  return simt::shuffle(mask, "__shfl_xor_sync", at, value, source, source <= last);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 simt::Site at = simt::Site::here()) {
  const int first = simt::segment(width, at);
  const int source = int(simt::self().lane()) - int(delta);
  return simt::shuffle(mask, "__shfl_up_sync", at, value, source, source >= first);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   simt::Site at = simt::Site::here()) {
  const int last = simt::segment(width, at) + width - 1;
  const int source = int(simt::self().lane()) + int(delta);
  return simt::shuffle(mask, "__shfl_down_sync", at, value, source, source <= last);
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              simt::Site at = simt::Site::here()) {
  return simt::vote(mask, "__ballot_sync", at, predicate);
}
inline int __any_sync(unsigned mask, int predicate, simt::Site at = simt::Site::here()) {
  return simt::vote(mask, "__any_sync", at, predicate) != 0;
}
inline int __all_sync(unsigned mask, int predicate, simt::Site at = simt::Site::here()) {
  return simt::vote(mask, "__all_sync", at, !predicate) == 0;
}
inline void __syncwarp(unsigned mask = ~0u, simt::Site at = simt::Site::here()) {
  simt::vote(mask, "__syncwarp", at, 0);
}
// Any set of lanes that holds the caller is a right answer, and this one finds who relies on more.
inline unsigned __activemask() { return 1u << simt::self().lane(); }

template <class T>
unsigned __match_any_sync(unsigned mask, T value, simt::Site at = simt::Site::here()) {
  using Lanes = simt::Lanes<T, unsigned>;
  return simt::warp_operation<unsigned>(mask, "__match_any_sync", at, value,
                                        [](const Lanes& lanes) {
    lanes.each([&](unsigned lane) {
      unsigned same = 0;
      lanes.each([&](unsigned other) {
        same |= unsigned(lanes.in(other) == lanes.in(lane)) << other;
      });
      lanes.out(lane) = same;
    });
  });
}

namespace simt {

template <class T, class Combine>
T reduce(unsigned mask, const char* what, Site at, T value, Combine) {
  return warp_operation<T>(mask, what, at, value, [](const Lanes<T, T>& lanes) {
    bool first = true;
    T total{};
    lanes.each([&](unsigned lane) {
      total = first ? lanes.in(lane) : Combine::of(total, lanes.in(lane));
      first = false;
    });
    lanes.each([&](unsigned lane) { lanes.out(lane) = total; });
  });
}

#define SIMT_REDUCE(name, expression)                                          \
  struct Reduce_##name {                                                       \
    template <class T>                                                         \
    static T of(T a, T b) {                                                    \
      return expression;                                                       \
    }                                                                          \
  };                                                                           \
  }                                                                            \
  template <class T>                                                           \
  T __reduce_##name##_sync(unsigned mask, T value,                             \
                           simt::Site at = simt::Site::here()) {               \
    return simt::reduce(mask, "__reduce_" #name "_sync", at, value,            \
                        simt::Reduce_##name{});                                \
  }                                                                            \
  namespace simt {
SIMT_REDUCE(add, a + b)
SIMT_REDUCE(min, a < b ? a : b)
SIMT_REDUCE(max, a < b ? b : a)
SIMT_REDUCE(and, a & b)
SIMT_REDUCE(or, a | b)
SIMT_REDUCE(xor, a ^ b)
#undef SIMT_REDUCE

}  // namespace simt
