// Products of matrices: mma.sync of registers, wgmma of shared memory.
#pragma once
#include "copies.h"

namespace ptx {

// ---- mma.sync: d (16 x 8) = a (16 x K) b (K x 8) + c, four registers of d and c.

template <int K, Element KIND>
Step mma(Warp& w, const Ins& i) {
  constexpr bool wide = KIND == Element::TF32;
  constexpr int each = wide ? 1 : 2;       // elements of a register
  constexpr int parts = K / (4 * each);    // registers of b; twice as many of a
  static thread_local float a[16][K], b[8][K], d[16][8];
  const auto value = [&](s32 op, int lane, int e) {
    const u32 v = lanes_of<u32>(w, op)[lane];
    if (wide) return tf32(v);
    const u16 h = u16(v >> 16 * e);
    return KIND == Element::BF16 ? BF16::wide(h) : F16::wide(h);
  };
  for (int l = 0; l < LANES; ++l) {
    const int g = l / 4, t = l % 4;
    for (int e = 0; e < each; ++e)
      for (int k = 0; k < parts; ++k) {
        const int column = 4 * each * k + each * t + e;
        a[g][column] = value(i.op[4 + 2 * k], l, e);
        a[g + 8][column] = value(i.op[4 + 2 * k + 1], l, e);
        b[g][column] = value(i.op[4 + 2 * parts + k], l, e);
      }
    for (int k = 0; k < 4; ++k)
      d[g + 8 * (k / 2)][2 * t + k % 2] = lanes_of<float>(w, i.op[4 + 3 * parts + k])[l];
  }
  for (int r = 0; r < 16; ++r)
    for (int c = 0; c < 8; ++c)
      d[r][c] = dot(d[r][c], K, [&](int k) { return a[r][k]; }, [&](int k) { return b[c][k]; });
  for (int l = 0; l < LANES; ++l)
    for (int k = 0; k < 4; ++k)
      lanes_of<float>(w, i.op[k])[l] = d[l / 4 + 8 * (k / 2)][2 * (l % 4) + k % 2];
  return NEXT;
}

// ---- operands in shared memory, as matrix descriptors say (PTX ISA, "Matrix Descriptor Format").

struct Operand {
  u32 start, leading, stride;
  int swizzle;  // 0 none, 1: 32, 2: 64, 3: 128 bytes
};
inline Operand wgmma_operand(u64 d) {
  if (d >> 49 & 7) fail("wgmma: a base offset is not modelled");
  const int mode = int(d >> 62);
  return {u32(d & 0x3fff) << 4, u32(d >> 16 & 0x3fff) << 4, u32(d >> 32 & 0x3fff) << 4, mode ? 4 - mode : 0};
}
// Shared offset of element (row, k), rows being M of A or N of B. inner: rows lie side by side.
inline u32 place(const Operand& o, u32 row, u32 k, bool inner, u32 element) {
  const u32 unit = 16 / element;                   // elements of 16 bytes
  const u32 atom = (16u << o.swizzle) / element;   // rows side by side, where they are inner
  u32 offset;
  if (!inner && !o.swizzle)
    offset = row / 8 * o.stride + row % 8 * 16 + k / unit * o.leading + k % unit * element;
  else if (!inner)
    offset = row / 8 * o.stride + row % 8 * (16u << o.swizzle) + k * element;
  else if (!o.swizzle)
    offset = row / unit * o.stride + row % unit * element + k / 8 * o.leading + k % 8 * 16;
  else
    offset = row / atom * o.leading + row % atom * element + k / 8 * o.stride + k % 8 * (16u << o.swizzle);
  return swizzled(o.start + offset, o.swizzle) - SHARED_BASE;
}
// each(shared offset, r, k) for every 16 bytes of `rows` rows from `first` on.
template <class Each>
void each_unit(Block& b, const Operand& o, u32 first, u32 rows, u32 depth, bool inner, u32 element,
               Each each) {
  const u32 unit = 16 / element;
  for (u32 r = 0; r < rows; r += inner ? unit : 1)
    for (u32 k = 0; k < depth; k += inner ? 1 : unit) {
      const u32 at = place(o, first + r, k, inner, element);
      if (at > b.shared.size() || at + 16 > b.shared.size())
        fail("a matrix operand at shared offset %d of %zu", int(at), b.shared.size());
      each(at, r, k);
    }
}
// out[row * depth + k]
inline void fetch(Block& b, const Operand& o, u32 first, u32 rows, u32 depth, bool inner, Element kind,
                  float* out) {
  const u32 element = bytes_of(kind), unit = 16 / element;
  each_unit(b, o, first, rows, depth, inner, element, [&](u32 at, u32 r, u32 k) {
    for (u32 e = 0; e < unit; ++e)
      out[inner ? (r + e) * depth + k : r * depth + k + e] = element_at(&b.shared[at + e * element], kind);
  });
}

// ---- wgmma: each warp multiplies the 16 rows of its own; nothing passes between the four.

// imm: n, kind, A in registers, A inner, B inner. Operands: n/2 of D, then A, B, whether D is added.
struct Wgmma {
  u32 n, depth;
  Element kind;
  bool registers, a_inner, b_inner;
  explicit Wgmma(const Ins& i)
      : n(u32(i.imm[0])), depth(Element(i.imm[1]) == Element::TF32 ? 8 : 16), kind(Element(i.imm[1])),
        registers(i.imm[2]), a_inner(i.imm[3]), b_inner(i.imm[4]) {}
  template <class Each>  // what a warp's share reads, by 16 bytes
  void each_read(Warp& w, const Product& p, Each each) const {
    Block& b = *w.block;
    const u32 element = bytes_of(kind);
    if (!registers)
      each_unit(b, wgmma_operand(p.a), u32(w.id % 4 * 16), 16, depth, a_inner, element,
                [&](u32 at, u32, u32) { each(at); });
    each_unit(b, wgmma_operand(p.b), 0, n, depth, b_inner, element, [&](u32 at, u32, u32) { each(at); });
  }
};
// Element k of a warp's accumulators of one lane: its row and column.
inline int wgmma_row(int lane, u32 k) { return lane / 4 + 8 * int(k / 2 % 2); }
inline int wgmma_column(int lane, u32 k) { return int(8 * (k / 4)) + 2 * (lane % 4) + int(k % 2); }

inline void perform(Warp& w, Product& p) {
  if (p.done) return;
  p.done = true;
  const Ins& i = *p.ins;
  const Wgmma s(i);
  Block& block = *w.block;
  static thread_local float a[16 * 16], b[256 * 16], d[16][256];
  if (s.registers) {
    for (int l = 0; l < LANES; ++l)
      for (u32 k = 0; k < 4; ++k) {
        const u32 v = p.registers[k][l];
        float* row = a + u32(l / 4 + 8 * int(k & 1)) * s.depth;
        if (s.kind == Element::TF32)
          row[u32(l % 4) + 4 * (k / 2)] = tf32(v);
        else
          for (u32 h = 0; h < 2; ++h) {
            const u16 half = u16(v >> 16 * h);
            row[8 * (k / 2) + 2 * u32(l % 4) + h] = element_at(reinterpret_cast<const u8*>(&half), s.kind);
          }
      }
  } else {
    fetch(block, wgmma_operand(p.a), u32(w.id % 4 * 16), 16, s.depth, s.a_inner, s.kind, a);
  }
  fetch(block, wgmma_operand(p.b), 0, s.n, s.depth, s.b_inner, s.kind, b);
  for (int l = 0; l < LANES; ++l)
    for (u32 k = 0; k < s.n / 2; ++k)
      d[wgmma_row(l, k)][wgmma_column(l, k)] = p.accumulate ? lanes_of<float>(w, i.op[k])[l] : 0;
  if (leeway.sums == 0) {  // column by column of a row at once, which the compiler vectorises
    static thread_local float turned[16][256];
    for (u32 c = 0; c < s.n; ++c)
      for (u32 k = 0; k < s.depth; ++k) turned[k][c] = b[c * s.depth + k];
    for (u32 r = 0; r < 16; ++r)
      for (u32 k = 0; k < s.depth; ++k) {
        const float v = a[r * s.depth + k];
        for (u32 c = 0; c < s.n; ++c) d[r][c] += v * turned[k][c];
      }
  } else {
    for (u32 r = 0; r < 16; ++r)
      for (u32 c = 0; c < s.n; ++c)
        d[r][c] = dot(d[r][c], int(s.depth), [&](int k) { return a[r * s.depth + u32(k)]; },
                      [&](int k) { return b[c * s.depth + u32(k)]; });
  }
  for (int l = 0; l < LANES; ++l)
    for (u32 k = 0; k < s.n / 2; ++k)
      lanes_of<float>(w, i.op[k])[l] = d[wgmma_row(l, k)][wgmma_column(l, k)];
}

inline size_t register_of(s32 op) { return size_t(op) / 64; }

inline Step wgmma(Warp& w, const Ins& i) {
  const Wgmma s(i);
  Product p{&i, 0, 0, {}, true, false};
  u32 next = s.n / 2;
  for (u32 k = 0; k < next; ++k)
    if (w.dirty[register_of(i.op[k])])
      fail("wgmma: no wgmma.fence since accumulator %u was written, or at all", k);
  if (s.registers) {
    for (int k = 0; k < 4; ++k) {
      const s32 op = i.op[next++];
      if (w.busy[register_of(op)]) fail("wgmma takes A from registers that are in flight");
      if (w.dirty[register_of(op)]) fail("wgmma: no wgmma.fence since a register of A was written, or at all");
      std::memcpy(p.registers[k], lanes_of<u32>(w, op), sizeof p.registers[k]);
      ++w.held[register_of(op)];
    }
  } else {
    p.a = lanes_of<u64>(w, i.op[next++])[0];
  }
  p.b = lanes_of<u64>(w, i.op[next++])[0];
  p.accumulate = *lanes_of<u32>(w, i.op[next]) & 1;
  if (w.block->cluster->options.races)
    s.each_read(w, p, [&](u32 at) {
      note_read(w, at, 16, true);
      note_being_read(*w.block, at, 16, 1);
    });
  for (u32 k = 0; k < s.n / 2; ++k) ++w.busy[register_of(i.op[k])];
  ++w.in_flight;
  w.products.push_back(p);
  if (at_once(*w.block)) {  // in order
    for (auto& group : w.product_groups)
      for (Product& before : group) perform(w, before);
    for (Product& before : w.products) perform(w, before);
  }
  return NEXT;
}
inline Step wgmma_fence(Warp& w, const Ins&) {
  std::fill(w.dirty.begin(), w.dirty.end(), u8(0));
  return NEXT;
}
inline Step wgmma_commit(Warp& w, const Ins&) {
  w.product_groups.push_back(std::move(w.products));
  w.products.clear();
  return NEXT;
}
inline Step wgmma_wait(Warp& w, const Ins& i) {  // imm: groups that may stay
  while (w.product_groups.size() > size_t(i.imm[0])) {
    for (Product& p : w.product_groups.front()) {
      perform(w, p);
      const Wgmma s(*p.ins);
      if (w.block->cluster->options.races)
        s.each_read(w, p, [&](u32 at) {
          note_being_read(*w.block, at, 16, -1);
          note_read(w, at, 16, true);  // whoever writes next must know of this wait
        });
      const s32* op = p.ins->op;
      for (u32 k = 0; k < s.n / 2; ++k) --w.busy[register_of(op[k])];
      for (u32 k = 0; s.registers && k < 4; ++k) --w.held[register_of(op[s.n / 2 + k])];
      --w.in_flight;
    }
    w.product_groups.pop_front();
  }
  return NEXT;
}

inline void add_products(Table& t) {
  t["mma.m16n8k16.bf16"] = {mma<16, Element::BF16>, ""};
  t["mma.m16n8k8.bf16"] = {mma<8, Element::BF16>, ""};
  t["mma.m16n8k16.f16"] = {mma<16, Element::F16>, ""};
  t["mma.m16n8k8.f16"] = {mma<8, Element::F16>, ""};
  t["mma.m16n8k8.tf32"] = {mma<8, Element::TF32>, ""};
  t["mma.m16n8k4.tf32"] = {mma<4, Element::TF32>, ""};
  t["wgmma"] = {wgmma, ""};
  t["wgmma.fence"] = {wgmma_fence, ""};
  t["wgmma.commit"] = {wgmma_commit, ""};
  t["wgmma.wait"] = {wgmma_wait, ""};
}

}  // namespace ptx
