// Activations of kernels/activations.py: x -> (f(x), f'(x)) in float32, on the GPU and on the host. A slope
// at a kink follows PyTorch: relu'(0) = 0, and a clamp's is 1 up to and at its bound. One that has no
// functor here is refused by the launchers in Python, and then runs in Triton.
#pragma once

#include <cmath>
#include <type_traits>

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

// Gates: phi(g) psi(u), `of` being phi and `up` psi. Each is made of its row's numbers, in the row's order,
// which a call brings at run time. A clamp's value at a NaN is the NaN, and its slope 0, as PyTorch's.

// min(x, limit)
struct Capped {
  float limit;

  FUSEDMLP_FN float value(float x) const { return x > limit ? limit : x; }
  FUSEDMLP_FN bool leaves(float x) const { return x <= limit; }
};

// clip(x, -limit, limit)
struct Clipped {
  float limit;

  FUSEDMLP_FN ValueSlope of(float x) const {
    const float above = x < -limit ? -limit : x;
    return {above > limit ? limit : above, fabsf(x) <= limit ? 1.f : 0.f};
  }
};

// cap tanh(x / cap)
struct SoftCapped {
  float cap, inverse;

  FUSEDMLP_FN explicit SoftCapped(float bound) : cap(bound), inverse(fast_reciprocal(bound)) {}
  FUSEDMLP_FN ValueSlope of(float x) const {
    const ValueSlope t = Tanh::of(x * inverse);
    return {cap * t.value, t.slope};
  }
};

// m sigmoid(alpha m) (clip(u, -limit, limit) + 1), m = min(g, limit)
struct SwigluOai {
  Capped gate;
  float alpha;
  Clipped linear;

  FUSEDMLP_FN explicit SwigluOai(const float* s) : gate{s[0]}, alpha(s[1]), linear{s[0]} {}
  FUSEDMLP_FN ValueSlope of(float g) const {
    const float m = gate.value(g);
    const ValueSlope y = x_sigmoid(m, alpha * m, alpha);
    return {y.value, gate.leaves(g) ? y.slope : 0};
  }
  FUSEDMLP_FN ValueSlope up(float u) const {
    const ValueSlope y = linear.of(u);
    return {y.value + 1, y.slope};
  }
};

// silu(min(g, limit)) clip(u, -limit, limit)
struct ClampedSwiglu {
  Capped gate;
  Clipped linear;

  FUSEDMLP_FN explicit ClampedSwiglu(const float* s) : gate{s[0]}, linear{s[0]} {}
  FUSEDMLP_FN ValueSlope of(float g) const {
    const ValueSlope y = Silu::of(gate.value(g));
    return {y.value, gate.leaves(g) ? y.slope : 0};
  }
  FUSEDMLP_FN ValueSlope up(float u) const { return linear.of(u); }
};

// min(silu(g), limit) clip(u, -limit, limit)
struct SwigluStep {
  Capped gate;
  Clipped linear;

  FUSEDMLP_FN explicit SwigluStep(const float* s) : gate{s[0]}, linear{s[0]} {}
  FUSEDMLP_FN ValueSlope of(float g) const {
    const ValueSlope y = Silu::of(g);
    return {gate.value(y.value), y.value > gate.limit ? 0 : y.slope};
  }
  FUSEDMLP_FN ValueSlope up(float u) const { return linear.of(u); }
};

// softcap(g) sigmoid(g) softcap(u), with a cap for each
struct Situ {
  SoftCapped gate, linear;

  FUSEDMLP_FN explicit Situ(const float* s) : gate(s[0]), linear(s[1]) {}
  FUSEDMLP_FN ValueSlope of(float g) const {
    const ValueSlope t = gate.of(g);
    const Sigmoids s = sigmoids(g);
    const float y = t.value * s.positive;
    return {y, t.slope * s.positive + y * s.negative};
  }
  FUSEDMLP_FN ValueSlope up(float u) const { return linear.of(u); }
};

// silu(gate_scale g) (up_scale u)
struct ScaledSwiglu {
  float gate_scale, up_scale;

  FUSEDMLP_FN explicit ScaledSwiglu(const float* s) : gate_scale(s[0]), up_scale(s[1]) {}
  FUSEDMLP_FN ValueSlope of(float g) const {
    const ValueSlope y = Silu::of(gate_scale * g);
    return {y.value, gate_scale * y.slope};
  }
  FUSEDMLP_FN ValueSlope up(float u) const { return {up_scale * u, up_scale}; }
};

// Whether a functor has a psi; where it has none, psi(u) is u and costs nothing.
template <class Act, class = void>
inline constexpr bool kHasUp = false;
template <class Act>
inline constexpr bool kHasUp<Act, std::void_t<decltype(&Act::up)>> = true;

// The tables: name in Python, functor. Their order, gates last, is an activation's number in a params
// struct. No kernel without u holds the gates.
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

#define FUSEDMLP_GATES(ROW)           \
  ROW(swiglu_oai, SwigluOai)          \
  ROW(clamped_swiglu, ClampedSwiglu)  \
  ROW(swiglu_step, SwigluStep)        \
  ROW(situ, Situ)                     \
  ROW(scaled_swiglu, ScaledSwiglu)

// A second name of a row: the same arithmetic of the same numbers.
#define FUSEDMLP_SAME(ROW) ROW(softcap_swiglu, situ)

enum class Activation : int {
#define FUSEDMLP_ROW(name, functor) name,
  FUSEDMLP_ACTIVATIONS(FUSEDMLP_ROW) FUSEDMLP_GATES(FUSEDMLP_ROW)
#undef FUSEDMLP_ROW
};

struct Named {
  const char* name;
  Activation number;
};
constexpr Named kActivations[] = {
#define FUSEDMLP_ROW(name, functor) {#name, Activation::name},
    FUSEDMLP_ACTIVATIONS(FUSEDMLP_ROW) FUSEDMLP_GATES(FUSEDMLP_ROW)
#undef FUSEDMLP_ROW
#define FUSEDMLP_ROW(name, row) {#name, Activation::row},
        FUSEDMLP_SAME(FUSEDMLP_ROW)
#undef FUSEDMLP_ROW
};

inline bool is_gate(int activation) {
  switch (static_cast<Activation>(activation)) {
#define FUSEDMLP_ROW(name, functor) case Activation::name:
    FUSEDMLP_GATES(FUSEDMLP_ROW)
#undef FUSEDMLP_ROW
    return true;
    default:
      return false;
  }
}

// body(functor) for one activation chosen at run time, made of the call's scalars: one branch outside
// the loops of the body. GATED: with a u, so that gates are among them.
template <bool GATED, class Body>
FUSEDMLP_FN void with_activation(int activation, const float (&scalars)[3], Body&& body) {
  switch (static_cast<Activation>(activation)) {
#define FUSEDMLP_ROW(name, functor) \
  case Activation::name:            \
    return body(functor{});
    FUSEDMLP_ACTIVATIONS(FUSEDMLP_ROW)
#undef FUSEDMLP_ROW
#define FUSEDMLP_ROW(name, functor)                        \
  case Activation::name:                                   \
    if constexpr (GATED) return body(functor(scalars));    \
    return;
    FUSEDMLP_GATES(FUSEDMLP_ROW)
#undef FUSEDMLP_ROW
  }
}

}  // namespace fusedmlp
