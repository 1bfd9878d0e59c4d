// What happens to an element between its accumulator and memory: the same for every architecture.
#pragma once

#include "activations.cuh"

namespace fusedmlp {

// act(g) u, or act(g).
template <class Act, bool GATED>
FUSEDMLP_FN float forward_of(float g, float u) {
  const float value = Act::of(g).value;
  return GATED ? value * u : value;
}

struct Gradients {
  float dg, du, h;
};

// dg = dh u act'(g), du = dh act(g), h = act(g) u; without u, dg = dh act'(g), h = act(g).
template <class Act, bool GATED>
FUSEDMLP_FN Gradients backward_of(float dh, float g, float u) {
  const ValueSlope act = Act::of(g);
  if (!GATED) return {dh * act.slope, 0, act.value};
  return {dh * act.slope * u, dh * act.value, act.value * u};
}

}  // namespace fusedmlp
