// The functors of csrc/activations.cuh over an array, one by its number.
#include "device.cuh"
#include "activations.cuh"

extern "C" int functor(const float* x, float* value, float* slope, int64_t n, int activation) {
  fusedmlp::with_activation(activation, [&](auto f) {
    for (int64_t i = 0; i < n; ++i) {
      const fusedmlp::ValueSlope y = f.of(x[i]);
      value[i] = y.value;
      slope[i] = y.slope;
    }
  });
  return 0;
}
