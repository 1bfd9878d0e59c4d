// What happens to an element between its accumulator and memory: the same for every architecture.
#pragma once

#include "activations.cuh"

namespace fusedmlp {

// phi(g) psi(u), or act(g).
template <bool GATED, class Act>
FUSEDMLP_FN float forward_of(const Act& act, float g, float u) {
  const float value = act.of(g).value;
  if constexpr (!GATED) {
    return value;
  } else if constexpr (kHasUp<Act>) {
    return value * act.up(u).value;
  } else {
    return value * u;
  }
}

struct Gradients {
  float dg, du, h;
};

// dg = dh psi(u) phi'(g), du = dh phi(g) psi'(u), h = phi(g) psi(u); without u, dg = dh act'(g), h = act(g).
template <bool GATED, class Act>
FUSEDMLP_FN Gradients backward_of(const Act& act, float dh, float g, float u) {
  const ValueSlope y = act.of(g);
  if constexpr (!GATED) {
    return {dh * y.slope, 0, y.value};
  } else if constexpr (kHasUp<Act>) {
    const ValueSlope up = act.up(u);
    return {dh * y.slope * up.value, dh * y.value * up.slope, y.value * up.value};
  } else {
    return {dh * y.slope * u, dh * y.value, y.value * u};
  }
}

}  // namespace fusedmlp
