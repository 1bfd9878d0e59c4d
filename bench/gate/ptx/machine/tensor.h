// tcgen05: products of a block's tensor core into tensor memory, in the order of their issue.
#pragma once
#include "products.h"

namespace ptx {

inline Operand tensor_operand(u64 d) {
  if (d >> 49 & 7 || d >> 52 & 1) fail("tcgen05: a base offset or an absolute leading offset is not modelled");
  const int mode = int(d >> 61 & 7);
  if (mode & 1) fail("tcgen05: swizzle mode %d is not modelled", mode);
  return {u32(d & 0x3fff) << 4, u32(d >> 16 & 0x3fff) << 4, u32(d >> 32 & 0x3fff) << 4, (8 - mode) / 2 % 4};
}
// The instruction descriptor of kind::f16 (float32 accumulators only).
struct Shape {
  u32 rows, n;
  bool a_inner, b_inner;
  Element kind;
  explicit Shape(u32 d)
      : rows((d >> 24 & 31) << 4), n((d >> 17 & 63) << 3), a_inner(d >> 15 & 1), b_inner(d >> 16 & 1),
        kind((d >> 7 & 7) == 1 ? Element::BF16 : Element::F16) {
    if ((d >> 4 & 3) != 1 || d >> 13 & 3 || (d >> 7 & 7) > 1 || (d >> 10 & 7) != (d >> 7 & 7))
      fail("tcgen05: instruction descriptor %08x is not modelled", d);
    if (rows != 64 && rows != 128) fail("tcgen05: a product of %u rows is not modelled", rows);
  }
};
constexpr u32 TENSOR_DEPTH = 16;
inline u32 lane_of(u32 rows, u32 r) { return rows == 64 ? 32 * (r / 16) + r % 16 : r; }
inline u32& cell(Block& b, u32 lane, u32 column) { return b.tensor[size_t(lane) * TENSOR_COLUMNS + column]; }
// How often products in flight write a column, in the even (0) or odd (1) groups of 16 lanes.
inline u8& busy(Block& b, u32 odd, u32 column) { return b.tensor_busy[odd * TENSOR_COLUMNS + column]; }
// A product of 64 rows takes every other group, from lane 0 or 16 on; one of 128 rows takes all.
template <class Each>
void each_half(const Shape& s, u32 lane, Each each) {
  if (s.rows == 128 || lane == 0) each(0);
  if (s.rows == 128 || lane == 16) each(1);
}
template <class Each>
void each_read(Block& b, const TensorProduct& p, const Shape& s, Each each) {
  const auto at_only = [&](u32 at, u32, u32) { each(at); };
  each_unit(b, tensor_operand(p.a), 0, s.rows, TENSOR_DEPTH, s.a_inner, 2, at_only);
  each_unit(b, tensor_operand(p.b), 0, s.n, TENSOR_DEPTH, s.b_inner, 2, at_only);
}

inline void perform(Block& b, const TensorProduct& p) {
  Cluster& c = *b.cluster;
  if (p.commit) {
    Clock clock = p.clock;
    clock[c.tensor_core()] = ++c.multiplied;
    for (Block& to : c.blocks)
      if (p.mask ? p.mask >> to.rank & 1 : &to == &b) arrive(mbarrier(to, p.mbarrier), clock, 0);
    return;
  }
  const Shape s(p.instruction);
  const u32 column = p.d & 0xffff, lane = p.d >> 16;
  std::vector<float> a(s.rows * TENSOR_DEPTH), matrix(s.n * TENSOR_DEPTH);
  fetch(b, tensor_operand(p.a), 0, s.rows, TENSOR_DEPTH, s.a_inner, s.kind, a.data());
  fetch(b, tensor_operand(p.b), 0, s.n, TENSOR_DEPTH, s.b_inner, s.kind, matrix.data());
  std::vector<float> turned(s.n * TENSOR_DEPTH);
  for (u32 n = 0; n < s.n; ++n)
    for (u32 k = 0; k < TENSOR_DEPTH; ++k) turned[k * s.n + n] = matrix[n * TENSOR_DEPTH + k];
  for (u32 r = 0; r < s.rows; ++r) {
    float* d = reinterpret_cast<float*>(&cell(b, lane_of(s.rows, r) + lane, column));
    if (!p.accumulate) std::fill(d, d + s.n, 0.0f);
    const float* row = &a[r * TENSOR_DEPTH];
    if (leeway.sums == 0) {
      for (u32 k = 0; k < TENSOR_DEPTH; ++k)
        for (u32 n = 0; n < s.n; ++n) d[n] += row[k] * turned[k * s.n + n];
    } else {
      for (u32 n = 0; n < s.n; ++n)
        d[n] = dot(d[n], TENSOR_DEPTH, [&](int k) { return row[k]; },
                   [&](int k) { return turned[u32(k) * s.n + n]; });
    }
  }
  each_half(s, lane, [&](u32 odd) {
    for (u32 n = 0; n < s.n; ++n) --busy(b, odd, column + n);
  });
  if (!c.options.races) return;
  const u32 now = c.multiplied + 1;  // the next commit's
  each_read(b, p, s, [&](u32 at) {
    note_being_read(b, at, 16, -1);
    granules(b, at, 16, [&](u32 g, Shadow&) { b.read[size_t(g) * c.agents() + c.tensor_core()] = now; });
  });
}
inline void run_products(Block& b) {
  for (; !b.products.empty(); b.products.pop_front()) perform(b, b.products.front());
}

inline Step tensor_mma(Warp& w, const Ins& i) {  // operands: d, a, b, instruction, accumulate
  Block& b = *w.block;
  for (int l = 0; l < LANES; ++l) {
    if (!here(w, l)) continue;
    const TensorProduct p{lanes_of<u64>(w, i.op[1])[l],
                          lanes_of<u64>(w, i.op[2])[l],
                          lanes_of<u32>(w, i.op[0])[l] + u32(i.imm[0]),
                          lanes_of<u32>(w, i.op[3])[l],
                          0,
                          0,
                          bool(*lanes_of<u32>(w, i.op[4]) >> l & 1),
                          false,
                          {}};
    const Shape s(p.instruction);
    const u32 column = p.d & 0xffff, lane = p.d >> 16;
    if (lane && !(s.rows == 64 && lane == 16)) fail("tcgen05.mma of %u rows to lane %u", s.rows, lane);
    if (column + s.n > b.tensor_used)
      fail("tcgen05.mma to columns %u to %u of %u allocated", column, column + s.n, b.tensor_used);
    each_half(s, lane, [&](u32 odd) {
      for (u32 n = 0; n < s.n; ++n) ++busy(b, odd, column + n);
    });
    if (b.cluster->options.races)  // written and fenced by now; until it is done nobody may write it
      each_read(b, p, s, [&](u32 at) {
        note_read(w, at, 16, true);
        note_being_read(b, at, 16, 1);
      });
    b.products.push_back(p);
  }
  if (at_once(b)) run_products(b);
  return NEXT;
}
inline Step tensor_commit(Warp& w, const Ins& i) {  // operands: mbarrier (and blocks); imm: offset
  Block& b = *w.block;
  for (int l = 0; l < LANES; ++l) {
    if (!here(w, l)) continue;
    const u32 address = address_with_offset(w, i, 0, l);
    const u32 mask = i.nop > 1 ? lanes_of<u16>(w, i.op[1])[l] : 0;
    known(w, b, address);
    b.products.push_back({0, 0, 0, 0, address, mask, false, true, w.clock});
    ++w.clock[size_t(w.agent)];
  }
  if (at_once(b)) run_products(b);
  return NEXT;
}

// imm: registers, offset, of .16x32bx2 the columns from the first half of lanes to the second, and
// whether it is .16x256b: 16 lanes of 8 columns a time, four registers as those of an mma's result.
template <class Each>
void each_cell(Warp& w, const Ins& i, s32 address_op, Each each) {
  Block& b = *w.block;
  const u32 n = u32(i.imm[0]), half = u32(i.imm[2]);
  const bool matrix = i.imm[3];
  const u32 address = lanes_of<u32>(w, address_op)[0] + u32(i.imm[1]);
  const u32 column = address & 0xffff, lane = address >> 16;
  const bool starts = lane % 32 == 0 || ((half || matrix) && lane % 32 == 16);
  if (lane / 32 != u32(w.id % 4) || !starts) fail("tcgen05: lane %u is not warp %d's", lane, w.id);
  const u32 end = column + (matrix ? 2 * n : n + half);
  if (end > b.tensor_used) fail("tcgen05: columns %u to %u of %u allocated", column, end, b.tensor_used);
  for (u32 k = 0; k < n; ++k)
    for (u32 l = 0; l < LANES; ++l) {
      const u32 at = matrix ? column + 8 * (k / 4) + 2 * (l % 4) + k % 2
                            : column + k + (half && l >= 16 ? half : 0);
      const u32 row = matrix ? lane + l / 4 + 8 * (k / 2 % 2) : half ? lane + l % 16 : lane + l;
      if (busy(b, row / 16 & 1, at)) fail("tcgen05: column %u is still written by a product", at);
      each(k, l, cell(b, row, at));
    }
}
inline Step tensor_load(Warp& w, const Ins& i) {
  each_cell(w, i, i.op[i.imm[0]], [&](u32 k, u32 l, u32& c) { lanes_of<u32>(w, i.op[k])[l] = c; });
  // To the letter of the ISA the registers are undefined until wait::ld. Triton 3.9 reads them before
  // and leaves it to ptxas that the values have come; so this is an option.
  for (int k = 0; w.block->cluster->options.strict && k < i.imm[0]; ++k) {
    ++w.busy[register_of(i.op[k])];
    ++w.in_flight;
    w.tensor_loads.push_back(i.op[k]);
  }
  return NEXT;
}
inline Step tensor_store(Warp& w, const Ins& i) {
  each_cell(w, i, i.op[i.imm[0]], [&](u32 k, u32 l, u32& c) { c = lanes_of<u32>(w, i.op[k])[l]; });
  return NEXT;
}
inline Step tensor_wait(Warp& w, const Ins&) {
  for (s32 r : w.tensor_loads) --w.busy[register_of(r)], --w.in_flight;
  w.tensor_loads.clear();
  return NEXT;
}
inline Step tensor_alloc(Warp& w, const Ins& i) {  // operands: where the address goes, columns
  Block& b = *w.block;
  const u32 columns = lanes_of<u32>(w, i.op[1])[0];
  const u32 offset = shared_offset(b, lanes_of<u32>(w, i.op[0])[0], 4, "tcgen05.alloc");
  if (columns < 32 || columns & (columns - 1) || b.tensor_used + columns > TENSOR_COLUMNS)
    fail("tcgen05.alloc of %u columns, %u being taken", columns, b.tensor_used);
  note_write(w, offset, 4, &b.tensor_used);
  std::memcpy(&b.shared[offset], &b.tensor_used, 4);
  b.tensor_used += columns;
  return NEXT;
}
inline Step tensor_dealloc(Warp& w, const Ins& i) {  // operands: address, columns
  if (!w.block->products.empty()) fail("tcgen05.dealloc while a product or a commit is in flight");
  w.block->tensor_used -= lanes_of<u32>(w, i.op[1])[0];
  return NEXT;
}

inline void add_tensor(Table& t) {
  t["tcgen05.mma"] = {tensor_mma, ""};
  t["tcgen05.commit"] = {tensor_commit, ""};
  t["tcgen05.ld"] = {tensor_load, ""};
  t["tcgen05.st"] = {tensor_store, ""};
  t["tcgen05.wait"] = {tensor_wait, ""};
  t["tcgen05.alloc"] = {tensor_alloc, ""};
  t["tcgen05.dealloc"] = {tensor_dealloc, ""};
}

}  // namespace ptx
