// Tensor-core operations of a warp (sm_80) and the moves between shared memory and their fragments.
#pragma once
#include <array>

#include "memory.h"
#include "warp.h"

namespace simt {

inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
inline float to_float(__half x) { return __half2float(x); }

template <class T>
float half_of(uint32_t pair, unsigned i) {
  T value;
  const auto raw = uint16_t(pair >> 16 * i);
  std::memcpy(static_cast<void*>(&value), &raw, 2);
  return to_float(value);
}

inline void check_row(const void* row, const char* what, Site at) {
  if (uintptr_t(row) % 16) fail(at, format("%s of a row that is not aligned to 16 bytes", what));
  if (!in_shared(row, 16)) fail(at, format("%s of a row outside shared memory", what));
}

using Registers = std::array<uint32_t, 4>;

// Lane l holds the 16-bit elements 2 (l % 4) and the next of row l / 4 of each 8 x 8 matrix, whose
// rows' addresses come from the lanes 8 i ... 8 i + 7.
template <bool TRANSPOSED>
Registers load_matrices(const void* row, const char* what, Site at) {
  check_row(row, what, at);
  using All = Lanes<const void*, Registers>;
  return warp_operation<Registers>(~0u, what, at, row, [](const All& lanes) {
    lanes.each([&](unsigned lane) {
      for (unsigned i = 0; i < 4; ++i) {
        uint32_t pair = 0;
        for (unsigned j = 0; j < 2; ++j) {
          const unsigned along = 2 * (lane % 4) + j, across = lane / 4;
          const unsigned r = TRANSPOSED ? along : across, c = TRANSPOSED ? across : along;
          pair |= uint32_t(static_cast<const uint16_t*>(lanes.in(8 * i + r))[c]) << 16 * j;
        }
        lanes.out(lane)[i] = pair;
      }
    });
  });
}

struct Store {
  void* row;
  Registers values;
};

inline void store_matrices(void* row, Registers values, Site at) {
  check_row(row, "stmatrix", at);
  const Store mine{row, values};
  warp_operation<int>(~0u, "stmatrix", at, mine, [](const Lanes<Store, int>& lanes) {
    lanes.each([&](unsigned lane) {
      for (unsigned i = 0; i < 4; ++i) {
        auto* target = static_cast<char*>(lanes.in(8 * i + lane / 4).row) + 4 * (lane % 4);
        std::memcpy(target, &lanes.in(lane).values[i], 4);
      }
    });
  });
}

struct Fragments {
  Registers a;
  std::array<uint32_t, 2> b;
  std::array<float, 4> c;
};

// D (16 x 8) = A (16 x 16) B (16 x 8) + C. Lane l: rows l / 4 and 8 below; A's columns and B's rows
// 2 (l % 4), the next, and 8 beyond them; B's column l / 4; D's columns 2 (l % 4) and the next.
template <class T>
std::array<float, 4> multiply(const Fragments& mine, Site at) {
  using Result = std::array<float, 4>;
  return warp_operation<Result>(~0u, "mma", at, mine, [](const Lanes<Fragments, Result>& lanes) {
    float a[16][16], b[16][8];
    lanes.each([&](unsigned lane) {
      const unsigned across = lane / 4, along = 2 * (lane % 4);
      for (unsigned i = 0; i < 4; ++i) {
        for (unsigned j = 0; j < 2; ++j) {
          a[across + 8 * (i % 2)][along + 8 * (i / 2) + j] = half_of<T>(lanes.in(lane).a[i], j);
          if (i < 2) b[along + 8 * i + j][across] = half_of<T>(lanes.in(lane).b[i], j);
        }
      }
    });
    lanes.each([&](unsigned lane) {
      for (unsigned i = 0; i < 4; ++i) {
        const unsigned row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
        float sum = lanes.in(lane).c[i];
        for (unsigned k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
        lanes.out(lane)[i] = sum;
      }
    });
  });
}

}  // namespace simt

namespace fusedmlp {

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, simt::Site at = simt::Site::here()) {
  const simt::Registers loaded = simt::load_matrices<false>(row, "ldmatrix", at);
  std::copy(loaded.begin(), loaded.end(), r);
}

inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row,
                              simt::Site at = simt::Site::here()) {
  const simt::Registers loaded = simt::load_matrices<true>(row, "ldmatrix.trans", at);
  std::copy(loaded.begin(), loaded.end(), r);
}

inline void stmatrix_x4(void* row, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3,
                        simt::Site at = simt::Site::here()) {
  simt::store_matrices(row, {r0, r1, r2, r3}, at);
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  const float (&c)[4], simt::Site at = simt::Site::here()) {
  const simt::Fragments mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {c[0], c[1], c[2], c[3]}};
  const auto result = simt::multiply<T>(mine, at);
  std::copy(result.begin(), result.end(), d);
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  simt::Site at = simt::Site::here()) {
  mma_m16n8k16<T>(d, a, b, d, at);
}

}  // namespace fusedmlp
