// Operands of the tensor cores in shared memory, by their 64-bit descriptors, and the product.
//
// Both layouts are of 16-bit elements under the 128-byte swizzle (PTX ISA, wgmma "Strides";
// CUTLASS, cute/atom/mma_traits_sm90_gmma.hpp, "canonical layouts"):
//   K-major   row r, column k      at 128 (r % 8) + SBO (r / 8) + 2 k
//   MN-major  k,     column n      at 2 (n % 64) + LBO (n / 64) + 128 (k % 8) + SBO (k / 8)
// from the start address, and the swizzle is applied to the bits of the resulting address.
#pragma once
#include <memory>

#include "mma.h"

namespace simt {

constexpr int DEPTH = 16;  // of K, in one product

struct Operand {
  uint32_t start, leading, stride;
};

// What the descriptors of both architectures have in common.
inline Operand operand_of(uint64_t descriptor) {
  const auto field = [&](int bit) { return uint32_t(descriptor >> bit & 0x3fff) << 4; };
  const Operand operand{field(0), field(16), field(32)};
  if (operand.start & 0x380) {
    fail(format("a swizzled operand at shared address %#x: its first row is not at a multiple of "
                "1024 bytes", operand.start));
  }
  if (descriptor >> 49 & 7) fail("a matrix descriptor with a base offset");
  return operand;
}

inline Operand operand_sm90(uint64_t descriptor) {
  if (descriptor >> 62 != 1) fail("a matrix descriptor without the 128-byte swizzle (type 1)");
  return operand_of(descriptor);
}

inline Operand operand_sm100(uint64_t descriptor) {
  if (descriptor >> 61 != 2) fail("a matrix descriptor without the 128-byte swizzle (type 2)");
  if ((descriptor >> 46 & 7) != 1) fail("a matrix descriptor that is not of version 1");
  if (descriptor >> 52 & 1) fail("a matrix descriptor with an absolute leading address");
  return operand_of(descriptor);
}

// Every value of 16 bits as a float.
template <class T>
const float* float_table() {
  static const std::vector<float> table = [] {
    std::vector<float> values(1 << 16);
    for (unsigned i = 0; i < values.size(); ++i) values[i] = half_of<T>(i, 0);
    return values;
  }();
  return table.data();
}

// Calls put(i, value) for the eight 16-bit elements at an address of the operand.
template <class Put>
void fetch_chunk(const Block& block, uint32_t address, const float* table, Put put) {
  uint16_t raw[8];
  std::memcpy(raw, shared_pointer(block, address ^ (address >> 3 & 0x70), 16), 16);
  for (int i = 0; i < 8; ++i) put(i, table[raw[i]]);
}

// rows x DEPTH, row by row.
inline void fetch_rows(const Block& block, Operand o, int rows, const float* table, float* to) {
  for (int r = 0; r < rows; ++r) {
    for (int k = 0; k < DEPTH; k += 8) {
      const uint32_t address = o.start + 128 * (r % 8) + o.stride * (r / 8) + 2 * k;
      fetch_chunk(block, address, table, [&](int i, float x) { to[r * DEPTH + k + i] = x; });
    }
  }
}

// DEPTH x columns, of a K-major or MN-major operand.
inline void fetch_columns(const Block& block, Operand o, bool mn_major, int columns,
                          const float* table, float* to) {
  if (!mn_major) {
    std::vector<float> rows(size_t(columns) * DEPTH);
    fetch_rows(block, o, columns, table, rows.data());
    for (int k = 0; k < DEPTH; ++k) {
      for (int n = 0; n < columns; ++n) to[k * columns + n] = rows[n * DEPTH + k];
    }
    return;
  }
  for (int k = 0; k < DEPTH; ++k) {
    for (int n = 0; n < columns; n += 8) {
      const uint32_t address = o.start + 2 * (n % 64) + o.leading * (n / 64) + 128 * (k % 8) +
                               o.stride * (k / 8);
      fetch_chunk(block, address, table, [&](int i, float x) { to[k * columns + n + i] = x; });
    }
  }
}

#if defined(__x86_64__)
#define SIMT_FAST __attribute__((optimize("O3"), target_clones("avx512f", "avx2", "default")))
#else
#define SIMT_FAST __attribute__((optimize("O3")))
#endif
SIMT_FAST static void add_scaled_row(float* __restrict to, const float* __restrict rows,
                                     const float* __restrict scale, int columns) {
  for (int k = 0; k < DEPTH; ++k) {
    for (int n = 0; n < columns; ++n) to[n] += scale[k] * rows[size_t(k) * columns + n];
  }
}
#undef SIMT_FAST

struct Product {
  Operand a, b;
  int rows, columns;
  bool mn_major, accumulate;
  const float* table;  // of the operands' type
};

// d (rows x columns, `pitch` floats apart) = a b [+ d]
inline void multiply(const Block& block, const Product& p, float* d, size_t pitch) {
  std::vector<float> a(size_t(p.rows) * DEPTH), b(size_t(p.columns) * DEPTH);
  fetch_rows(block, p.a, p.rows, p.table, a.data());
  fetch_columns(block, p.b, p.mn_major, p.columns, p.table, b.data());
  for (int r = 0; r < p.rows; ++r) {
    if (!p.accumulate) std::fill_n(d + r * pitch, p.columns, 0.0f);
    add_scaled_row(d + r * pitch, b.data(), a.data() + r * DEPTH, p.columns);
  }
}

}  // namespace simt
