// What everything here stands on: integers, faults, numbers of 16 bits, registers of 32 lanes.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

namespace ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;

constexpr int LANES = 32;
constexpr u32 ALL = ~0u;
constexpr u8 POISON = 0xff;  // makes a NaN of every floating type

// Generic addresses: state spaces that are not global lie in windows of their own, far from any
// tensor. Python gives tensors addresses in [TENSORS, PARAMS).
constexpr u64 SHARED_WINDOW = u64(1) << 56;
constexpr u64 LOCAL_WINDOW = u64(2) << 56;
constexpr u64 PARAM_WINDOW = u64(3) << 56;
constexpr u64 WINDOW = u64(0xff) << 56;
constexpr u32 SHARED_BASE = 1024;  // the first shared byte, as on the hardware
// A shared::cluster address of another block holds its rank + 1 above this bit.
constexpr int RANK_BIT = 24;

struct Fault {
  std::string what;
};
[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
  char text[640];
  va_list list;
  va_start(list, format);
  vsnprintf(text, sizeof text, format, list);
  va_end(list);
  throw Fault{text};
}

// ---- numbers

template <class To, class From>
inline To bits(From v) {
  return std::bit_cast<To>(v);
}
struct BF16 {
  static float wide(u16 h) { return bits<float>(u32(h) << 16); }
  static u16 narrow(float f) {
    const u32 b = bits<u32>(f);
    if ((b & 0x7fffffff) > 0x7f800000) return 0x7fff;
    return u16((b + 0x7fff + (b >> 16 & 1)) >> 16);
  }
};
struct F16 {
  static float wide(u16 h) { return float(bits<_Float16>(h)); }
  static u16 narrow(float f) {
    if (f != f) return 0x7fff;
    return bits<u16>(_Float16(f));
  }
};
inline float tf32(u32 b) { return bits<float>(b & 0xffffe000); }
inline float ftz(float f) { return std::fabs(f) < 0x1p-126f ? std::copysign(0.0f, f) : f; }

enum class Element : int { BF16, F16, TF32 };
inline float element_at(const u8* p, Element kind) {
  if (kind == Element::TF32) {
    u32 v;
    std::memcpy(&v, p, 4);
    return tf32(v);
  }
  u16 v;
  std::memcpy(&v, p, 2);
  return kind == Element::BF16 ? BF16::wide(v) : F16::wide(v);
}
inline u32 bytes_of(Element kind) { return kind == Element::TF32 ? 4 : 2; }

// What the hardware leaves open. A tensor core's sum of products has no order of its own, and an
// .approx function is right only to some bound; so both can be varied, and no test may hang on them.
struct Leeway {
  int sums = 0;     // 0: in order; 1: backwards; 2: a step's products exactly, then one addition
  float noise = 0;  // in [-1, 1]: where in its bound an approximate function lies
};
inline Leeway leeway;  // one machine runs at a time

template <class A, class B>
inline float dot(float start, int depth, A a, B b) {
  if (leeway.sums == 2) {
    double sum = 0;
    for (int k = 0; k < depth; ++k) sum += double(a(k)) * b(k);
    return float(start + sum);
  }
  float sum = start;
  if (leeway.sums == 1)
    for (int k = depth; k-- > 0;) sum += a(k) * b(k);
  else
    for (int k = 0; k < depth; ++k) sum += a(k) * b(k);
  return sum;
}
// An approximate result, as far off as `relative` allows.
inline float near(double exact, double relative) { return float(exact * (1 + leeway.noise * relative)); }

// ---- steps of the machine

enum Step { NEXT, JUMP, WAIT, EXIT };
struct Warp;
struct Ins;
using Fn = Step (*)(Warp&, const Ins&);

struct Ins {
  Fn fn;
  const s32* op;   // offsets of operands in the register file
  const s64* imm;  // numbers that are no operands
  s32 nop, guard, target, line;
  u32 flags;
  bool negated;
};
// What an instruction asks of the loop. Python sets them; see lower.py.
enum Flags : u32 {
  CONVERGENT = 1,  // .sync.aligned: every live lane must be here
  WAITS = 2,       // may touch registers in flight: the wait for them itself
  COPIES = 4,      // a mov, of which ptxas makes no instruction where it likes
};
// From this bit on: how many operands it writes, some of which a wgmma of this kernel uses.
constexpr int MARKS = 8;

// One entry of the table of instructions: how it is done, and of what width each operand is, the
// result first: 'p' a predicate, else its bytes. Instructions of warps have no such list.
struct Entry {
  Fn fn;
  std::string operands;
};
using Table = std::unordered_map<std::string, Entry>;

}  // namespace ptx
