// csrc/hopper.cuh on the host runner.
#pragma once
#include "simt.h"
#include "tma.h"
#include "wgmma.h"

namespace fusedmlp {

// One lane of the warp, the same one each time; which one, a kernel must not rely on.
inline bool elect_one(simt::Site at = simt::Site::here()) {
  simt::Fiber& fiber = simt::self();
  simt::vote(~0u, "elect_one", at, 0);
  const unsigned leader = simt::scheduler.at_random() ? (simt::scheduler.seed * 7 + 3) % 32 : 0;
  return fiber.lane() == leader;
}

// setmaxnreg: how many registers a thread has decides nothing here.
template <int R>
void registers_give() {
  static_assert(R % 8 == 0 && R >= 24 && R <= 256);
}
template <int R>
void registers_take() {
  static_assert(R % 8 == 0 && R >= 24 && R <= 256);
}

}  // namespace fusedmlp
