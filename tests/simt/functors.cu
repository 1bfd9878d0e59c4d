// The functors of csrc/activations.cuh over arrays, one by its number: phi, psi, and a whole gate with
// dh = 1.
#include "device.cuh"
#include "epilogue.cuh"

namespace {

template <class Body>
int with(int activation, const float* s, Body&& body) {
  const float scalars[3] = {s[0], s[1], s[2]};
  fusedmlp::with_activation<true>(activation, scalars, body);
  return 0;
}

}  // namespace

extern "C" int functor(const float* x, float* value, float* slope, int64_t n, int activation,
                       const float* scalars) {
  return with(activation, scalars, [&](auto f) {
    for (int64_t i = 0; i < n; ++i) {
      const fusedmlp::ValueSlope y = f.of(x[i]);
      value[i] = y.value, slope[i] = y.slope;
    }
  });
}

// Writes nothing where there is no psi.
extern "C" int functor_up(const float* u, float* value, float* slope, int64_t n, int activation,
                          const float* scalars) {
  return with(activation, scalars, [&](auto f) {
    if constexpr (fusedmlp::kHasUp<decltype(f)>) {
      for (int64_t i = 0; i < n; ++i) {
        const fusedmlp::ValueSlope y = f.up(u[i]);
        value[i] = y.value, slope[i] = y.slope;
      }
    }
  });
}

extern "C" int gate(const float* g, const float* u, float* h, float* again, float* dg, float* du,
                    int64_t n, int activation, const float* scalars) {
  return with(activation, scalars, [&](auto f) {
    for (int64_t i = 0; i < n; ++i) {
      const fusedmlp::Gradients d = fusedmlp::backward_of<true>(f, 1, g[i], u[i]);
      h[i] = d.h, dg[i] = d.dg, du[i] = d.du;
      again[i] = fusedmlp::forward_of<true>(f, g[i], u[i]);
    }
  });
}
