// Activations of kernels/activations.py: x -> (f(x), f'(x)) in float32, on the GPU and on the host. A slope
// at a kink follows PyTorch: relu'(0) = 0. One that has no functor here is refused by the launchers in
// Python, and then runs in Triton.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define FUSEDMLP_FN __host__ __device__ __forceinline__
#else
#define FUSEDMLP_FN inline
#endif

namespace fusedmlp {

struct ValueSlope {
  float value, slope;
};

// 2^x to 2 ulp; below 2^-126 it is 0.
FUSEDMLP_FN float fast_exp2(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

// 1 / x to 1 ulp, for x far from float32's ends.
FUSEDMLP_FN float fast_reciprocal(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1 / x;
#endif
}

struct Sigmoids {
  float positive, negative;  // sigmoid(z), sigmoid(-z)
};

// Neither is 1 - the other, which cancels; nothing overflows.
FUSEDMLP_FN Sigmoids sigmoids(float z) {
  const float e = fast_exp2(-1.4426950408889634f * fabsf(z));
  const float large = fast_reciprocal(1 + e), small = e * large;
  return z < 0 ? Sigmoids{small, large} : Sigmoids{large, small};
}

// x sigmoid(z), where dz = z'(x). Silu, quick_gelu and tanh-gelu differ in z alone.
FUSEDMLP_FN ValueSlope x_sigmoid(float x, float z, float dz) {
  const Sigmoids s = sigmoids(z);
  const float y = x * s.positive;
  return {y, s.positive + y * s.negative * dz};
}

struct Silu {
  static FUSEDMLP_FN ValueSlope of(float x) { return x_sigmoid(x, x, 1); }
};

struct Gelu {
  static FUSEDMLP_FN ValueSlope of(float x) {
    const float cdf = 0.5f * (1 + erff(x * 0.7071067811865476f));
    const float pdf = 0.3989422804014327f * fast_exp2(-0.7213475204444817f * x * x);
    return {x * cdf, cdf + x * pdf};
  }
};

struct GeluTanh {
  // (1 + tanh(z / 2)) / 2 = sigmoid(z), with z = 2 sqrt(2 / pi) (x + 0.044715 x^3).
  static FUSEDMLP_FN ValueSlope of(float x) {
    const float x2 = x * x, c = 1.5957691216057308f;
    return x_sigmoid(x, c * x * (1 + 0.044715f * x2), c * (1 + 0.134145f * x2));
  }
};

struct QuickGelu {
  static FUSEDMLP_FN ValueSlope of(float x) { return x_sigmoid(x, 1.702f * x, 1.702f); }
};

// Not fmaxf: that turns a NaN into 0.
struct Relu {
  static FUSEDMLP_FN ValueSlope of(float x) { return {x <= 0 ? 0.f : x, x > 0 ? 1.f : 0.f}; }
};

struct ReluSq {
  static FUSEDMLP_FN ValueSlope of(float x) {
    const float r = Relu::of(x).value;
    return {r * r, 2 * r};
  }
};

struct Sigmoid {
  static FUSEDMLP_FN ValueSlope of(float x) {
    const Sigmoids s = sigmoids(x);
    return {s.positive, s.positive * s.negative};
  }
};

struct Tanh {
  // sigmoid(2x) - sigmoid(-2x) cancels near 0; below 0.2 the odd series is good to 6e-8 of x.
  static FUSEDMLP_FN ValueSlope of(float x) {
    const float x2 = x * x;
    const float series = x * (1 + x2 * (-1.f / 3 + x2 * (2.f / 15 - x2 * (17.f / 315))));
    const Sigmoids s = sigmoids(2 * x);
    return {fabsf(x) < 0.2f ? series : s.positive - s.negative, 4 * s.positive * s.negative};
  }
};

struct Identity {
  static FUSEDMLP_FN ValueSlope of(float x) { return {x, 1}; }
};

struct Gelu2 {
  static FUSEDMLP_FN ValueSlope of(float x) {
    const ValueSlope y = Gelu::of(x);
    return {y.value * y.value, 2 * y.value * y.slope};
  }
};

struct BSilu {
  static FUSEDMLP_FN ValueSlope of(float x) {
    constexpr float alpha = 1.67f;
    const Sigmoids s = sigmoids(x);
    const float y = (x + alpha) * s.positive;
    return {y - 0.5f * alpha, s.positive + y * s.negative};
  }
};

// The table: name in Python, functor. Its order is an activation's number in a params struct.
#define FUSEDMLP_ACTIVATIONS(ROW) \
  ROW(silu, Silu)                 \
  ROW(gelu, Gelu)                 \
  ROW(gelu_tanh, GeluTanh)        \
  ROW(quick_gelu, QuickGelu)      \
  ROW(relu, Relu)                 \
  ROW(relu_sq, ReluSq)            \
  ROW(sigmoid, Sigmoid)           \
  ROW(tanh, Tanh)                 \
  ROW(identity, Identity)         \
  ROW(gelu2, Gelu2)               \
  ROW(bsilu, BSilu)

enum class Activation : int {
#define FUSEDMLP_ROW(name, functor) name,
  FUSEDMLP_ACTIVATIONS(FUSEDMLP_ROW)
#undef FUSEDMLP_ROW
      count
};

constexpr const char* kActivationNames[] = {
#define FUSEDMLP_ROW(name, functor) #name,
    FUSEDMLP_ACTIVATIONS(FUSEDMLP_ROW)
#undef FUSEDMLP_ROW
};

// body(functor) for one activation chosen at run time: one branch outside the loops of the body.
template <class Body>
FUSEDMLP_FN void with_activation(int activation, Body&& body) {
  switch (static_cast<Activation>(activation)) {
#define FUSEDMLP_ROW(name, functor) \
  case Activation::name:            \
    return body(functor{});
    FUSEDMLP_ACTIVATIONS(FUSEDMLP_ROW)
#undef FUSEDMLP_ROW
    case Activation::count:
      return;
  }
}

}  // namespace fusedmlp
