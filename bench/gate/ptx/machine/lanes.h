// Instructions that each lane carries out for itself: a name of the PTX ISA, and what it computes.
//
// The lambda's own types say how wide the operands are; Python reads that from the table. Names are
// those of the ISA without what changes nothing here: .rn, .sat where stated, .uni, cache hints.
#pragma once
#include "state.h"

namespace ptx {

template <class F>
struct Signature : Signature<decltype(&F::operator())> {};
template <class F, class D, class... A>
struct Signature<D (F::*)(A...) const> {
  using Result = D;
  static std::string text() {
    std::string s = std::to_string(sizeof(D));
    ((s += "," + std::to_string(sizeof(A))), ...);
    return s;
  }
  template <size_t... K>
  static void run(Warp& w, const Ins& i, std::index_sequence<K...>) {
    D* d = lanes_of<D>(w, i.op[0]);
    const std::tuple<const A*...> from{lanes_of<A>(w, i.op[K + 1])...};
    const F f{};
    if (w.m == ALL) {
      for (int l = 0; l < LANES; ++l) d[l] = f(std::get<K>(from)[l]...);
    } else {
      for (int l = 0; l < LANES; ++l)
        if (here(w, l)) d[l] = f(std::get<K>(from)[l]...);
    }
  }
  static Step step(Warp& w, const Ins& i) {
    run(w, i, std::index_sequence_for<A...>());
    return NEXT;
  }
  // A comparison: its result is a predicate.
  static Step test(Warp& w, const Ins& i) {
    return [&]<size_t... K>(std::index_sequence<K...>) {
      const std::tuple<const A*...> from{lanes_of<A>(w, i.op[K + 1])...};
      const F f{};
      u32 result = 0;
      for (int l = 0; l < LANES; ++l) result |= u32(bool(f(std::get<K>(from)[l]...))) << l;
      set_mask(w, i.op[0], result);
      return NEXT;
    }(std::index_sequence_for<A...>());
  }
};

class Lanes {
 public:
  explicit Lanes(Table& table) : t(table) {}
  template <class F>
  void operator()(std::initializer_list<const char*> names, F) {
    for (const char* name : names) t[name] = {Signature<F>::step, Signature<F>::text()};
  }
  template <class F>
  void operator()(const std::string& name, F) {
    t[name] = {Signature<F>::step, Signature<F>::text()};
  }
  template <class F>
  void test(const std::string& name, F) {
    t[name] = {Signature<F>::test, "p" + Signature<F>::text().substr(1)};
  }

 private:
  Table& t;
};

// ---- integers

template <class T>
T quotient(T a, T b) {
  if (b == 0) return T(-1);
  if constexpr (std::is_signed_v<T>)
    if (b == -1) return T(0 - std::make_unsigned_t<T>(a));
  return T(a / b);
}
template <class T>
T remainder(T a, T b) {
  if (b == 0) return a;
  if constexpr (std::is_signed_v<T>)
    if (b == -1) return 0;
  return T(a % b);
}
template <class T>
T bit_field(T a, u32 at, u32 count) {
  at &= 255, count &= 255;
  constexpr u32 width = 8 * sizeof(T);
  if (count == 0) return 0;
  const u32 last = std::min(at + count - 1, width - 1);
  const bool sign = std::is_signed_v<T> && (u64(std::make_unsigned_t<T>(a)) >> last & 1);
  u64 d = 0;
  for (u32 k = 0; k < width; ++k) {
    const u32 from = at + k;
    const bool bit = k < count && from < width ? u64(std::make_unsigned_t<T>(a)) >> from & 1 : sign;
    d |= u64(bit) << k;
  }
  return T(d);
}
inline u32 byte_permute(u32 a, u32 b, u32 how) {
  const u64 bytes = u64(b) << 32 | a;
  u32 d = 0;
  for (int k = 0; k < 4; ++k) {
    const u32 s = how >> 4 * k & 15;
    u32 byte = u32(bytes >> 8 * (s & 7) & 255);
    if (s & 8) byte = byte & 128 ? 255 : 0;
    d |= byte << 8 * k;
  }
  return d;
}
inline u32 reversed(u32 v) {
  u32 r = 0;
  for (int k = 0; k < 32; ++k) r |= (v >> k & 1) << (31 - k);
  return r;
}

// Each under the type names that the ISA gives it.
template <class U, class S>
void add_integers(Lanes& lanes, const std::string& bits) {
  constexpr u32 width = 8 * sizeof(U);
  const auto as = [&](const char* types, const char* op, auto f) {
    for (; *types; ++types) lanes(std::string(op) + "." + *types + bits, f);
  };
  const auto each = [&](const char* op, auto f, auto g) {
    as("u", op, f);
    as("s", op, g);
  };
  as("us", "add", [](U a, U b) { return U(a + b); });
  as("us", "sub", [](U a, U b) { return U(a - b); });
  as("us", "mul.lo", [](U a, U b) { return U(u64(a) * b); });
  as("us", "mad.lo", [](U a, U b, U c) { return U(u64(a) * b + c); });
  as("b", "and", [](U a, U b) { return U(a & b); });
  as("b", "or", [](U a, U b) { return U(a | b); });
  as("b", "xor", [](U a, U b) { return U(a ^ b); });
  as("b", "not", [](U a) { return U(~a); });
  as("s", "neg", [](U a) { return U(0 - a); });
  as("s", "abs", [](S a) { return S(a < 0 ? 0 - U(a) : U(a)); });
  as("bus", "mov", [](U a) { return a; });
  as("b", "shl", [](U a, u32 b) { return U(b >= width ? 0 : u64(a) << b); });
  as("bu", "shr", [](U a, u32 b) { return U(b >= width ? 0 : a >> b); });
  as("s", "shr", [](S a, u32 b) { return S(a >> (b >= width ? width - 1 : b)); });
  each("min", [](U a, U b) { return std::min(a, b); }, [](S a, S b) { return std::min(a, b); });
  each("max", [](U a, U b) { return std::max(a, b); }, [](S a, S b) { return std::max(a, b); });
  each("div", [](U a, U b) { return quotient<U>(a, b); }, [](S a, S b) { return quotient<S>(a, b); });
  each("rem", [](U a, U b) { return remainder<U>(a, b); }, [](S a, S b) { return remainder<S>(a, b); });

  const auto compare = [&](const char* op, const char* unsigned_op, auto f, auto g) {
    lanes.test(std::string("setp.") + op + ".s" + bits, g);
    lanes.test(std::string("setp.") + op + ".u" + bits, f);
    if (unsigned_op)
      lanes.test(std::string("setp.") + unsigned_op + ".u" + bits, f);
    else
      lanes.test(std::string("setp.") + op + ".b" + bits, f);
  };
  compare("eq", nullptr, [](U a, U b) { return a == b; }, [](S a, S b) { return a == b; });
  compare("ne", nullptr, [](U a, U b) { return a != b; }, [](S a, S b) { return a != b; });
  compare("lt", "lo", [](U a, U b) { return a < b; }, [](S a, S b) { return a < b; });
  compare("le", "ls", [](U a, U b) { return a <= b; }, [](S a, S b) { return a <= b; });
  compare("gt", "hi", [](U a, U b) { return a > b; }, [](S a, S b) { return a > b; });
  compare("ge", "hs", [](U a, U b) { return a >= b; }, [](S a, S b) { return a >= b; });
}

// ---- floating point

inline float smaller(float a, float b) {
  return a != a ? b : b != b ? a : a < b || (a == b && std::signbit(a)) ? a : b;
}
inline float larger(float a, float b) {
  return a != a ? b : b != b ? a : a > b || (a == b && !std::signbit(a)) ? a : b;
}
// The float next to `d` whose last bit is 1, unless d is a float: rounding it again is harmless.
inline float odd(double d) {
  const float f = float(d);
  if (double(f) == d || d != d || std::isinf(f) || bits<u32>(f) & 1) return f;
  return bits<float>(bits<u32>(f) + (std::fabs(d) > std::fabs(double(f)) ? 1u : ~0u));
}
// a + b, rounded to odd in float64: what was cut off shows in the last bit.
inline double odd_sum(double a, double b) {
  const double sum = a + b, part = sum - a, error = (a - (sum - part)) + (b - part);
  if (error == 0 || error != error || std::isinf(sum) || bits<u64>(sum) & 1) return sum;
  return bits<double>(bits<u64>(sum) + ((error > 0) == (sum > 0) ? 1 : ~u64(0)));
}
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();

// T holds the value, `wide` makes a float of it.
template <class T, class Wide>
void add_float_tests(Lanes& lanes, const std::string& type, Wide) {
  const auto add = [&](const char* op, auto f) {
    lanes.test(std::string("setp.") + op + "." + type,
               [](T a, T b) { return decltype(f)()(Wide()(a), Wide()(b)); });
    if constexpr (std::is_same_v<T, float>)  // float16's subnormals are not float32's
      lanes.test(std::string("setp.") + op + ".ftz." + type,
                 [](T a, T b) { return decltype(f)()(ftz(a), ftz(b)); });
  };
  add("eq", [](float a, float b) { return a == b; });
  add("ne", [](float a, float b) { return a < b || a > b; });
  add("lt", [](float a, float b) { return a < b; });
  add("le", [](float a, float b) { return a <= b; });
  add("gt", [](float a, float b) { return a > b; });
  add("ge", [](float a, float b) { return a >= b; });
  add("equ", [](float a, float b) { return !(a < b || a > b); });
  add("neu", [](float a, float b) { return !(a == b); });
  add("ltu", [](float a, float b) { return !(a >= b); });
  add("leu", [](float a, float b) { return !(a > b); });
  add("gtu", [](float a, float b) { return !(a <= b); });
  add("geu", [](float a, float b) { return !(a < b); });
  add("nan", [](float a, float b) { return a != a || b != b; });
  add("num", [](float a, float b) { return a == a && b == b; });
}

inline void add_float32(Lanes& lanes) {
  // Each with .ftz, which flushes what goes in and what comes out.
  const auto one = [&](const std::string& op, auto f) {
    lanes(op + ".f32", [](float a) { return float(decltype(f)()(a)); });
    lanes(op + ".ftz.f32", [](float a) { return ftz(float(decltype(f)()(ftz(a)))); });
  };
  const auto two = [&](const std::string& op, auto f) {
    lanes(op + ".f32", [](float a, float b) { return float(decltype(f)()(a, b)); });
    lanes(op + ".ftz.f32", [](float a, float b) { return ftz(decltype(f)()(ftz(a), ftz(b))); });
  };
  const auto three = [&](const std::string& op, auto f) {
    lanes(op + ".f32", [](float a, float b, float c) { return float(decltype(f)()(a, b, c)); });
    lanes(op + ".ftz.f32",
          [](float a, float b, float c) { return ftz(decltype(f)()(ftz(a), ftz(b), ftz(c))); });
  };
  two("add", [](float a, float b) { return a + b; });
  two("sub", [](float a, float b) { return a - b; });
  two("mul", [](float a, float b) { return a * b; });
  three("fma", [](float a, float b, float c) { return std::fma(a, b, c); });
  // Towards -infinity, as CUDA's exp asks for. 64 bits hold the sum but for what no float shows.
  three("fma.rm", [](float a, float b, float c) {
    const long double exact = (long double)a * b + c;
    const float f = float(exact);
    return f > exact ? std::nextafter(f, -std::numeric_limits<float>::infinity()) : f;
  });
  two("min", [](float a, float b) { return smaller(a, b); });
  two("max", [](float a, float b) { return larger(a, b); });
  two("min.NaN", [](float a, float b) { return a != a || b != b ? NOT_A_NUMBER : smaller(a, b); });
  two("max.NaN", [](float a, float b) { return a != a || b != b ? NOT_A_NUMBER : larger(a, b); });
  lanes("copysign.f32", [](float a, float b) { return std::copysign(b, a); });
  two("div", [](float a, float b) { return a / b; });
  // The bounds below are those that the ISA states, as relative errors; of sine and cosine absolute.
  two("div.full", [](float a, float b) { return near(double(a) / b, 0x1p-22); });
  two("div.approx", [](float a, float b) {  // by more than 2^126: 0, or NaN of infinity
    if (std::fabs(b) > 0x1p126f && !std::isinf(b)) return a * std::copysign(0.0f, b);
    return near(double(a) / b, 0x1p-22);
  });
  one("abs", [](float a) { return std::fabs(a); });
  one("neg", [](float a) { return -a; });
  one("sqrt", [](float a) { return std::sqrt(a); });
  one("rcp", [](float a) { return 1 / a; });
  one("sqrt.approx", [](float a) { return near(std::sqrt(double(a)), 0x1p-23); });
  one("rsqrt.approx", [](float a) { return near(1 / std::sqrt(double(a)), 0x1.125p-23); });
  one("rcp.approx", [](float a) { return near(1 / double(a), 0x1p-23); });
  one("ex2.approx", [](float a) { return near(std::exp2(double(a)), 0x1p-22); });
  one("lg2.approx", [](float a) { return near(std::log2(double(a)), 0x1p-22); });
  const auto beside = [](double exact) { return float(exact + leeway.noise * 0x1.6p-21); };
  one("sin.approx", [](float a) { return decltype(beside)()(std::sin(double(a))); });
  one("cos.approx", [](float a) { return decltype(beside)()(std::cos(double(a))); });
  lanes("tanh.approx.f32", [](float a) { return near(std::tanh(double(a)), 0x1p-11); });
  const auto rounded = [&](const std::string& how, auto f) {
    lanes("cvt." + how + ".f32.f32", f);
    lanes("cvt." + how + ".ftz.f32.f32", [](float a) { return decltype(f)()(ftz(a)); });
  };
  rounded("rmi", [](float a) { return std::floor(a); });
  rounded("rpi", [](float a) { return std::ceil(a); });
  rounded("rzi", [](float a) { return std::trunc(a); });
  rounded("rni", [](float a) { return std::nearbyint(a); });
  lanes("cvt.sat.f32.f32", [](float a) { return a > 0 ? std::min(a, 1.0f) : 0.0f; });  // NaN too
}

// float32 has more than twice the digits of these: to round a sum or a product twice is to round it
// once.
template <class H>
void add_halves(Lanes& lanes, const std::string& type) {
  const auto two = [&](const std::string& op, auto f) {
    using F = decltype(f);
    lanes(op + "." + type, [](u16 a, u16 b) { return H::narrow(F()(H::wide(a), H::wide(b))); });
    lanes(op + "." + type + "x2", [](u32 a, u32 b) {
      const u16 low = H::narrow(F()(H::wide(u16(a)), H::wide(u16(b))));
      return u32(H::narrow(F()(H::wide(u16(a >> 16)), H::wide(u16(b >> 16))))) << 16 | low;
    });
  };
  two("add", [](float a, float b) { return a + b; });
  two("sub", [](float a, float b) { return a - b; });
  two("mul", [](float a, float b) { return a * b; });
  two("min", [](float a, float b) { return smaller(a, b); });
  two("max", [](float a, float b) { return larger(a, b); });
  two("min.NaN", [](float a, float b) { return a != a || b != b ? NOT_A_NUMBER : smaller(a, b); });
  two("max.NaN", [](float a, float b) { return a != a || b != b ? NOT_A_NUMBER : larger(a, b); });
  // The product is exact in float64; the sum, rounded to odd on its way, is then rounded once.
  const auto fused = [](u16 a, u16 b, u16 c) {
    return H::narrow(odd(odd_sum(double(H::wide(a)) * H::wide(b), H::wide(c))));
  };
  lanes("fma." + type, fused);
  lanes("fma." + type + "x2", [](u32 a, u32 b, u32 c) {
    const decltype(fused) f{};
    return u32(f(u16(a >> 16), u16(b >> 16), u16(c >> 16))) << 16 | f(u16(a), u16(b), u16(c));
  });
  lanes("neg." + type, [](u16 a) { return u16(a ^ 0x8000); });
  lanes("abs." + type, [](u16 a) { return u16(a & 0x7fff); });
  lanes("neg." + type + "x2", [](u32 a) { return a ^ 0x80008000; });
  lanes("abs." + type + "x2", [](u32 a) { return a & 0x7fff7fff; });
  // A float32 and a half: the half is exact in the other.
  lanes("add.f32." + type, [](u16 a, float b) { return H::wide(a) + b; });
  lanes("sub.f32." + type, [](u16 a, float b) { return H::wide(a) - b; });
  lanes("fma.f32." + type, [](u16 a, u16 b, float c) { return std::fma(H::wide(a), H::wide(b), c); });
  lanes("cvt.f32." + type, [](u16 a) { return H::wide(a); });
  lanes("cvt.ftz.f32." + type, [](u16 a) { return ftz(H::wide(a)); });
  lanes("cvt.rn." + type + ".f32", [](float a) { return H::narrow(a); });
  lanes("cvt.rn.ftz." + type + ".f32", [](float a) { return H::narrow(ftz(a)); });
  lanes("cvt.rn." + type + "x2.f32",
        [](float a, float b) { return u32(H::narrow(a)) << 16 | H::narrow(b); });
  add_float_tests<u16>(lanes, type, [](u16 h) { return H::wide(h); });
}

// Two float32 in 64 bits.
inline void add_pairs(Lanes& lanes) {
  const auto add = [&](const std::string& op, auto f) {
    using F = decltype(f);
    for (const char* flush : {"", ".ftz"}) {
      if (*flush)
        lanes(op + ".ftz.f32x2", [](u64 a, u64 b, u64 c) {
          const auto g = [](u32 x, u32 y, u32 z) {
            return bits<u32>(ftz(F()(ftz(bits<float>(x)), ftz(bits<float>(y)), ftz(bits<float>(z)))));
          };
          return u64(g(u32(a >> 32), u32(b >> 32), u32(c >> 32))) << 32 | g(u32(a), u32(b), u32(c));
        });
      else
        lanes(op + ".f32x2", [](u64 a, u64 b, u64 c) {
          const auto g = [](u32 x, u32 y, u32 z) {
            return bits<u32>(F()(bits<float>(x), bits<float>(y), bits<float>(z)));
          };
          return u64(g(u32(a >> 32), u32(b >> 32), u32(c >> 32))) << 32 | g(u32(a), u32(b), u32(c));
        });
    }
  };
  add("fma", [](float a, float b, float c) { return std::fma(a, b, c); });
  const auto two = [&](const char* op, auto f) {
    using F = decltype(f);
    lanes(std::string(op) + ".f32x2", [](u64 a, u64 b) {
      const auto g = [](u32 x, u32 y) { return bits<u32>(float(F()(bits<float>(x), bits<float>(y)))); };
      return u64(g(u32(a >> 32), u32(b >> 32))) << 32 | g(u32(a), u32(b));
    });
    lanes(std::string(op) + ".ftz.f32x2", [](u64 a, u64 b) {
      const auto g = [](u32 x, u32 y) {
        return bits<u32>(ftz(F()(ftz(bits<float>(x)), ftz(bits<float>(y)))));
      };
      return u64(g(u32(a >> 32), u32(b >> 32))) << 32 | g(u32(a), u32(b));
    });
  };
  two("add", [](float a, float b) { return a + b; });
  two("sub", [](float a, float b) { return a - b; });
  two("mul", [](float a, float b) { return a * b; });
}

template <class I>
I to_integer(float a) {  // what is too large becomes the largest; NaN 0, of 64 bits the sign bit
  if (a != a) return sizeof(I) == 8 ? I(u64(1) << 63) : 0;
  if (double(a) >= double(std::numeric_limits<I>::max())) return std::numeric_limits<I>::max();
  if (double(a) <= double(std::numeric_limits<I>::min())) return std::numeric_limits<I>::min();
  return I(a);
}

// Between integers: to a type, from a type. A register may be wider than either.
template <class To, class From>
void add_integer_cvt(Lanes& lanes, const char* to, const char* from) {
  // 8-bit values live in 16-bit registers.
  using D = std::conditional_t<sizeof(To) == 1, std::conditional_t<std::is_signed_v<To>, s16, u16>, To>;
  using A = std::conditional_t<sizeof(From) == 1, u16, From>;
  lanes(std::string("cvt.") + to + "." + from, [](A a) { return D(To(From(a))); });
}
template <class To>
void add_integer_cvts(Lanes& lanes, const char* to) {
  add_integer_cvt<To, u8>(lanes, to, "u8"), add_integer_cvt<To, s8>(lanes, to, "s8");
  add_integer_cvt<To, u16>(lanes, to, "u16"), add_integer_cvt<To, s16>(lanes, to, "s16");
  add_integer_cvt<To, u32>(lanes, to, "u32"), add_integer_cvt<To, s32>(lanes, to, "s32");
  add_integer_cvt<To, u64>(lanes, to, "u64"), add_integer_cvt<To, s64>(lanes, to, "s64");
}
template <class I>
void add_float_cvts(Lanes& lanes, const std::string& type) {
  lanes("cvt.rn.f32." + type, [](I a) { return float(a); });
  const auto rounded = [&](const std::string& how, auto f) {
    using F = decltype(f);
    lanes("cvt." + how + "." + type + ".f32", [](float a) { return to_integer<I>(F()(a)); });
    lanes("cvt." + how + ".ftz." + type + ".f32", [](float a) { return to_integer<I>(F()(ftz(a))); });
  };
  rounded("rzi", [](float a) { return std::trunc(a); });
  rounded("rni", [](float a) { return std::nearbyint(a); });
  rounded("rmi", [](float a) { return std::floor(a); });
  rounded("rpi", [](float a) { return std::ceil(a); });
}

// ---- predicates are masks

template <class F>
Step masks(Warp& w, const Ins& i) {
  set_mask(w, i.op[0], F()(*lanes_of<u32>(w, i.op[1]), *lanes_of<u32>(w, i.op[i.nop - 1])));
  return NEXT;
}
// A predicate or a register by another predicate.
template <class T>
Step select(Warp& w, const Ins& i) {
  T* d = lanes_of<T>(w, i.op[0]);
  const T *a = lanes_of<T>(w, i.op[1]), *b = lanes_of<T>(w, i.op[2]);
  const u32 p = *lanes_of<u32>(w, i.op[3]);
  for (int l = 0; l < LANES; ++l)
    if (here(w, l)) d[l] = p >> l & 1 ? a[l] : b[l];
  return NEXT;
}
// Two comparisons at once, of the halves of packed operands. Operands: p, q, a, b.
template <class H, class F>
Step test_halves(Warp& w, const Ins& i) {
  const u32 *a = lanes_of<u32>(w, i.op[2]), *b = lanes_of<u32>(w, i.op[3]);
  u32 low = 0, high = 0;
  for (int l = 0; l < LANES; ++l) {
    low |= u32(F()(H::wide(u16(a[l])), H::wide(u16(b[l])))) << l;
    high |= u32(F()(H::wide(u16(a[l] >> 16)), H::wide(u16(b[l] >> 16)))) << l;
  }
  set_mask(w, i.op[0], low);
  set_mask(w, i.op[1], high);
  return NEXT;
}
// Parts of 16 or 32 bits of one register. imm: bytes of a part.
template <class Whole, class Piece, bool PACK>
Step parts(Warp& w, const Ins& i) {
  constexpr int bits_of_piece = int(8 * sizeof(Whole));
  const int n = i.nop - 1, width = bits_of_piece / n;
  for (int l = 0; l < LANES; ++l) {
    if (!here(w, l)) continue;
    const u64 mask = width == 64 ? ~u64(0) : (u64(1) << width) - 1;
    if (PACK) {
      u64 v = 0;
      for (int k = 0; k < n; ++k) v |= (u64(lanes_of<Piece>(w, i.op[k + 1])[l]) & mask) << (k * width);
      lanes_of<Whole>(w, i.op[0])[l] = Whole(v);
    } else {
      const u64 v = lanes_of<Whole>(w, i.op[n])[l];
      for (int k = 0; k < n; ++k)
        if (i.op[k] >= 0) lanes_of<Piece>(w, i.op[k])[l] = Piece(v >> (k * width) & mask);
    }
  }
  return NEXT;
}

inline void add_lanes(Table& t) {
  Lanes lanes(t);
  add_integers<u16, s16>(lanes, "16");
  add_integers<u32, s32>(lanes, "32");
  add_integers<u64, s64>(lanes, "64");
  lanes({"mov.f32"}, [](u32 a) { return a; });
  lanes({"mov.f64"}, [](u64 a) { return a; });
  lanes({"mul.wide.s32"}, [](s32 a, s32 b) { return s64(a) * b; });
  lanes({"mul.wide.u32"}, [](u32 a, u32 b) { return u64(a) * b; });
  lanes({"mul.wide.s16"}, [](s16 a, s16 b) { return s32(a) * b; });
  lanes({"mul.wide.u16"}, [](u16 a, u16 b) { return u32(a) * b; });
  lanes({"mul.hi.s16"}, [](s16 a, s16 b) { return s16(s32(a) * b >> 16); });
  lanes({"mul.hi.u16"}, [](u16 a, u16 b) { return u16(u32(a) * b >> 16); });
  lanes({"mul.hi.s32"}, [](s32 a, s32 b) { return s32(s64(a) * b >> 32); });
  lanes({"mul.hi.u32"}, [](u32 a, u32 b) { return u32(u64(a) * b >> 32); });
  lanes({"mul.hi.u64"}, [](u64 a, u64 b) { return u64((unsigned __int128)a * b >> 64); });
  lanes({"mad.wide.s32"}, [](s32 a, s32 b, s64 c) { return s64(a) * b + c; });
  lanes({"mad.wide.u32"}, [](u32 a, u32 b, u64 c) { return u64(a) * b + c; });
  lanes({"mad.wide.s16"}, [](s16 a, s16 b, s32 c) { return s32(a) * b + c; });
  lanes({"mad.wide.u16"}, [](u16 a, u16 b, u32 c) { return u32(a) * b + c; });
  lanes({"bfe.u32"}, [](u32 a, u32 b, u32 c) { return bit_field<u32>(a, b, c); });
  lanes({"bfe.s32"}, [](s32 a, u32 b, u32 c) { return bit_field<s32>(a, b, c); });
  lanes({"bfi.b32"}, [](u32 a, u32 b, u32 at, u32 n) {
    at &= 255, n &= 255;
    u32 d = b;
    for (u32 k = 0; k < n && at + k < 32; ++k) d = (d & ~(1u << (at + k))) | (a >> k & 1) << (at + k);
    return d;
  });
  lanes({"prmt.b32"}, [](u32 a, u32 b, u32 c) { return byte_permute(a, b, c); });
  lanes({"shf.l.wrap.b32"}, [](u32 a, u32 b, u32 c) { return u32((u64(b) << 32 | a) << (c & 31) >> 32); });
  lanes({"shf.r.wrap.b32"}, [](u32 a, u32 b, u32 c) { return u32((u64(b) << 32 | a) >> (c & 31)); });
  lanes({"popc.b32"}, [](u32 a) { return u32(std::popcount(a)); });
  lanes({"clz.b32"}, [](u32 a) { return u32(std::countl_zero(a)); });
  lanes({"brev.b32"}, [](u32 a) { return reversed(a); });
  lanes({"bfind.u32"}, [](u32 a) { return a ? u32(31 - std::countl_zero(a)) : ALL; });
  lanes({"lop3.b32"}, [](u32 a, u32 b, u32 c, u32 table) {
    u32 v = 0;
    for (u32 k = 0; k < 8; ++k)
      if (table >> k & 1) v |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
    return v;
  });

  add_float32(lanes);
  add_float_tests<float>(lanes, "f32", [](float a) { return a; });
  add_halves<BF16>(lanes, "bf16");
  add_halves<F16>(lanes, "f16");
  add_pairs(lanes);
  lanes({"cvt.rna.tf32.f32"}, [](u32 a) {
    return (a & 0x7f800000) == 0x7f800000 ? a : u32((a + 0x1000) & 0xffffe000);
  });
  add_integer_cvts<u8>(lanes, "u8"), add_integer_cvts<s8>(lanes, "s8");
  add_integer_cvts<u16>(lanes, "u16"), add_integer_cvts<s16>(lanes, "s16");
  add_integer_cvts<u32>(lanes, "u32"), add_integer_cvts<s32>(lanes, "s32");
  add_integer_cvts<u64>(lanes, "u64"), add_integer_cvts<s64>(lanes, "s64");
  add_float_cvts<s16>(lanes, "s16"), add_float_cvts<u16>(lanes, "u16");
  add_float_cvts<s32>(lanes, "s32"), add_float_cvts<u32>(lanes, "u32");
  add_float_cvts<s64>(lanes, "s64"), add_float_cvts<u64>(lanes, "u64");

  const auto mask = [&]<class F>(const char* name, const char* operands, F) {
    t[name] = {masks<F>, operands};
  };
  mask("and.pred", "p,p,p", [](u32 a, u32 b) { return a & b; });
  mask("or.pred", "p,p,p", [](u32 a, u32 b) { return a | b; });
  mask("xor.pred", "p,p,p", [](u32 a, u32 b) { return a ^ b; });
  mask("not.pred", "p,p", [](u32 a, u32) { return ~a; });
  mask("mov.pred", "p,p", [](u32 a, u32) { return a; });
  for (const char* type : {"b", "u", "s", "f"}) {
    if (*type != 'f') t[std::string("selp.") + type + "16"] = {select<u16>, "2,2,2,p"};
    t[std::string("selp.") + type + "32"] = {select<u32>, "4,4,4,p"};
    t[std::string("selp.") + type + "64"] = {select<u64>, "8,8,8,p"};
  }
  const auto pairs = [&]<class F>(const char* relation, F) {
    t[std::string("setp.") + relation + ".bf16x2"] = {test_halves<BF16, F>, "p,p,4,4"};
    t[std::string("setp.") + relation + ".f16x2"] = {test_halves<F16, F>, "p,p,4,4"};
  };
  pairs("eq", [](float a, float b) { return a == b; });
  pairs("lt", [](float a, float b) { return a < b; });
  pairs("le", [](float a, float b) { return a <= b; });
  pairs("gt", [](float a, float b) { return a > b; });
  pairs("ge", [](float a, float b) { return a >= b; });
  pairs("neu", [](float a, float b) { return !(a == b); });
  pairs("nan", [](float a, float b) { return a != a || b != b; });
  t["pack.b32"] = {parts<u32, u16, true>, ""};
  t["pack.b64.2"] = {parts<u64, u32, true>, ""};
  t["pack.b64.4"] = {parts<u64, u16, true>, ""};
  t["unpack.b32"] = {parts<u32, u16, false>, ""};
  t["unpack.b64.2"] = {parts<u64, u32, false>, ""};
  t["unpack.b64.4"] = {parts<u64, u16, false>, ""};
  // The low part of a wider register, for an instruction that reads a narrower one.
  lanes({"narrow.4.2"}, [](u32 a) { return u16(a); });
  lanes({"narrow.8.2"}, [](u64 a) { return u16(a); });
  lanes({"narrow.8.4"}, [](u64 a) { return u32(a); });
}

}  // namespace ptx
