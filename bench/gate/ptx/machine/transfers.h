// Loads, stores, atomics, exchanges between lanes, and matrices of 8 x 8 to and from shared memory.
#pragma once
#include "memory.h"

namespace ptx {

enum Space : int { GLOBAL, SHARED, PARAM, LOCAL, GENERIC };

// What imm holds of a load or a store, in this order; the operands are the data, then the address.
struct Transfer {
  Space space;
  u32 bytes, count;     // of one element; elements of the vector
  int width;            // bytes of the registers
  bool is_signed, wide; // of the value; of the address
  s64 offset;
  explicit Transfer(const Ins& i)
      : space(Space(i.imm[0])), bytes(u32(i.imm[1])), count(u32(i.imm[2])), width(int(i.imm[3])),
        is_signed(i.imm[4]), wide(i.imm[5]), offset(i.imm[6]) {}
  u64 address(Warp& w, s32 op, int lane) const {
    return (wide ? lanes_of<u64>(w, op)[lane] : u64(lanes_of<u32>(w, op)[lane])) + u64(offset);
  }
};

inline u8* place(Warp& w, Space space, u64 address, u32 bytes, Access access, int lane, const void* data) {
  const bool load = access == Access::READ;
  const char* what = load ? "load" : access == Access::WRITE ? "store" : "atomic";
  if (address % bytes)
    fail("misaligned %s of %u bytes at 0x%llx", what, bytes, (unsigned long long)address);
  if (space == GENERIC) {
    const u64 window = address & WINDOW;
    space = window == SHARED_WINDOW  ? SHARED
            : window == LOCAL_WINDOW ? LOCAL
            : window == PARAM_WINDOW ? PARAM
                                     : GLOBAL;
    if (space != GLOBAL) address &= ~WINDOW;
  }
  if (space == GLOBAL) return global(w, address, bytes, access, what, data);
  if (space == SHARED) {
    u32 at = u32(address);
    Block& b = block_of(w, at);
    if (&b != w.block) fail("a %s in another block's shared memory is not modelled", what);
    const u32 offset = shared_offset(b, at, bytes, what);
    if (access != Access::WRITE) note_read(w, offset, bytes);
    if (!load) note_write(w, offset, bytes, data);
    return b.shared.data() + offset;
  }
  if (space == LOCAL) {
    auto& local = w.local[size_t(lane)];
    if (address + bytes > local.size()) fail("local %s past the end of %zu bytes", what, local.size());
    return local.data() + address;
  }
  if (!load) fail("a store to parameters");
  if (address + bytes > w.block->cluster->param_bytes) fail("parameter load past the end");
  return const_cast<u8*>(w.block->cluster->params) + address;
}

inline Step load(Warp& w, const Ins& i) {
  const Transfer t(i);
  for (int l = 0; l < LANES; ++l) {
    if (!here(w, l)) continue;
    const u64 address = t.address(w, i.op[t.count], l);
    const u8* p = place(w, t.space, address, t.bytes * t.count, Access::READ, l, nullptr);
    for (u32 k = 0; k < t.count; ++k, p += t.bytes) {
      u64 v = 0;
      std::memcpy(&v, p, t.bytes);
      if (t.is_signed && t.bytes < 8 && v >> (8 * t.bytes - 1) & 1) v |= ~u64(0) << 8 * t.bytes;
      if (i.op[k] < 0) continue;
      if (t.width == 4)
        lanes_of<u32>(w, i.op[k])[l] = u32(v);
      else if (t.width == 2)
        lanes_of<u16>(w, i.op[k])[l] = u16(v);
      else
        lanes_of<u64>(w, i.op[k])[l] = v;
    }
  }
  return NEXT;
}

inline Step store(Warp& w, const Ins& i) {
  const Transfer t(i);
  for (int l = 0; l < LANES; ++l) {
    if (!here(w, l)) continue;
    u8 data[32];
    for (u32 k = 0; k < t.count; ++k)
      std::memcpy(data + k * t.bytes, w.registers + i.op[k] + l * t.width, t.bytes);
    const u32 bytes = t.bytes * t.count;
    u8* p = place(w, t.space, t.address(w, i.op[t.count], l), bytes, Access::WRITE, l, data);
    std::memcpy(p, data, bytes);
  }
  return NEXT;
}

// Lane after lane. Operands: the old value or none, address, operand (a cas: compared with, new).
template <class F>
Step atomic(Warp& w, const Ins& i) {
  using T = std::invoke_result_t<F, u32, u32, u32>;
  const Transfer t(i);
  for (int l = 0; l < LANES; ++l) {
    if (!here(w, l)) continue;
    u8* p = place(w, t.space, t.address(w, i.op[1], l), sizeof(T), Access::ATOMIC, l, nullptr);
    T old;
    std::memcpy(&old, p, sizeof(T));
    const T next = F()(old, lanes_of<T>(w, i.op[2])[l], i.nop > 3 ? lanes_of<T>(w, i.op[3])[l] : T());
    std::memcpy(p, &next, sizeof(T));
    if (i.op[0] >= 0) lanes_of<T>(w, i.op[0])[l] = old;
  }
  return NEXT;
}

// ---- exchanges. The lanes that a mask names must all be here.

inline void need(Warp& w, u32 named) {
  if (named & w.alive & ~w.m)
    fail("lanes %08x are named and live, but only %08x are here", named & w.alive, w.m);
  if (w.m & ~named) fail("lanes %08x are here, but only %08x are named", w.m, named);
}

// Operands: result, a, b, c, mask (and a predicate).
template <int MODE>  // 0 up, 1 down, 2 bfly, 3 idx
Step shuffle(Warp& w, const Ins& i) {
  const u32 *a = lanes_of<u32>(w, i.op[1]), *b = lanes_of<u32>(w, i.op[2]), *c = lanes_of<u32>(w, i.op[3]);
  u32 result[LANES], inside = 0;
  for (int l = 0; l < LANES; ++l) {
    if (!here(w, l)) continue;
    need(w, lanes_of<u32>(w, i.op[4])[l]);
    const u32 by = b[l] & 31, clamp = c[l] & 31, segment = c[l] >> 8 & 31;
    const int low = int(u32(l) & segment), bound = int((u32(l) & segment) | (clamp & ~segment));
    int from = MODE == 0   ? l - int(by)
               : MODE == 1 ? l + int(by)
               : MODE == 2 ? l ^ int(by)
                           : int((by & ~segment) | u32(low));
    const bool ok = MODE == 0 ? from >= bound : from <= bound;
    if (!ok) from = l;
    if (!here(w, from)) fail("shfl reads lane %d, which is not there", from);
    result[l] = a[from];
    inside |= u32(ok) << l;
  }
  u32* d = lanes_of<u32>(w, i.op[0]);
  for (int l = 0; l < LANES; ++l)
    if (here(w, l)) d[l] = result[l];
  if (i.nop > 5) set_mask(w, i.op[5], inside);
  return NEXT;
}

enum class Vote { ANY, ALL, BALLOT };
template <Vote MODE>  // operands: result, predicate, mask
Step vote(Warp& w, const Ins& i) {
  const u32 named = lanes_of<u32>(w, i.op[2])[std::countr_zero(w.m)];
  need(w, named);
  const u32 yes = *lanes_of<u32>(w, i.op[1]) & w.m & named;
  if (MODE == Vote::BALLOT) {
    for (int l = 0; l < LANES; ++l)
      if (here(w, l)) lanes_of<u32>(w, i.op[0])[l] = yes;
  } else {
    const bool result = MODE == Vote::ANY ? yes != 0 : yes == (w.m & named);
    set_mask(w, i.op[0], result ? ALL : 0);
  }
  return NEXT;
}

// Operands: result, value, mask.
template <class F>
Step reduce(Warp& w, const Ins& i) {
  using T = std::invoke_result_t<F, u32, u32>;
  need(w, lanes_of<u32>(w, i.op[2])[std::countr_zero(w.m)]);
  const T* a = lanes_of<T>(w, i.op[1]);
  bool first = true;
  T v{};
  for (int l = 0; l < LANES; ++l)
    if (here(w, l)) v = first ? a[l] : F()(v, a[l]), first = false;
  for (int l = 0; l < LANES; ++l)
    if (here(w, l)) lanes_of<T>(w, i.op[0])[l] = v;
  return NEXT;
}

inline Step match_any(Warp& w, const Ins& i) {  // operands: result, value, mask
  need(w, lanes_of<u32>(w, i.op[2])[std::countr_zero(w.m)]);
  const u32* a = lanes_of<u32>(w, i.op[1]);
  u32 equal[LANES] = {};
  for (int l = 0; l < LANES; ++l)
    for (int o = 0; o < LANES; ++o) equal[l] |= u32(here(w, o) && a[o] == a[l]) << o;
  for (int l = 0; l < LANES; ++l)
    if (here(w, l)) lanes_of<u32>(w, i.op[0])[l] = equal[l];
  return NEXT;
}

inline Step elect(Warp& w, const Ins& i) {  // operands: lane or none, predicate, mask
  need(w, lanes_of<u32>(w, i.op[2])[std::countr_zero(w.m)]);
  const u32 leader = u32(std::countr_zero(w.m));
  if (i.op[0] >= 0)
    for (int l = 0; l < LANES; ++l)
      if (here(w, l)) lanes_of<u32>(w, i.op[0])[l] = leader;
  set_mask(w, i.op[1], 1u << leader);
  return NEXT;
}

inline Step warp_sync(Warp& w, const Ins& i) {
  need(w, lanes_of<u32>(w, i.op[0])[std::countr_zero(w.m)]);
  return NEXT;
}

// ---- matrices of 8 x 8 elements of 16 bits. imm: how many, transposed, offset.

template <bool LOAD>
Step matrices(Warp& w, const Ins& i) {
  const int n = int(i.imm[0]);
  const bool transposed = i.imm[1];
  const char* what = LOAD ? "ldmatrix" : "stmatrix";
  const u32* at = lanes_of<u32>(w, i.op[n]);
  Block& b = *w.block;
  for (int k = 0; k < n; ++k) {
    u16 tile[8][8];
    u32* d = lanes_of<u32>(w, i.op[k]);
    // Lane l holds two elements of row l / 4, or of column l / 4 where it is transposed.
    const auto element = [&](int l, int half) -> u16& {
      const int r = l / 4, c = 2 * (l % 4) + half;
      return transposed ? tile[c][r] : tile[r][c];
    };
    if (!LOAD)
      for (int l = 0; l < LANES; ++l) element(l, 0) = u16(d[l]), element(l, 1) = u16(d[l] >> 16);
    for (int r = 0; r < 8; ++r) {
      const u32 address = at[8 * k + r] + u32(i.imm[2]);
      if (address % 16) fail("%s: a row is not aligned to 16 bytes", what);
      const u32 offset = shared_offset(b, address, 16, what);
      if (LOAD) {
        note_read(w, offset, 16);
        std::memcpy(tile[r], &b.shared[offset], 16);
      } else {
        note_write(w, offset, 16, tile[r]);
        std::memcpy(&b.shared[offset], tile[r], 16);
      }
    }
    if (LOAD)
      for (int l = 0; l < LANES; ++l) d[l] = u32(element(l, 1)) << 16 | element(l, 0);
  }
  return NEXT;
}

inline void add_transfers(Table& t) {
  t["ld"] = {load, ""};
  t["st"] = {store, ""};
  t["shfl.up"] = {shuffle<0>, ""};
  t["shfl.down"] = {shuffle<1>, ""};
  t["shfl.bfly"] = {shuffle<2>, ""};
  t["shfl.idx"] = {shuffle<3>, ""};
  t["vote.any"] = {vote<Vote::ANY>, ""};
  t["vote.all"] = {vote<Vote::ALL>, ""};
  t["vote.ballot"] = {vote<Vote::BALLOT>, ""};
  t["match.any.b32"] = {match_any, ""};
  t["elect"] = {elect, ""};
  t["bar.warp"] = {warp_sync, ""};
  t["ldmatrix"] = {matrices<true>, ""};
  t["stmatrix"] = {matrices<false>, ""};

  const auto atom = [&]<class F>(const char* name, F) { t[std::string("atom.") + name] = {atomic<F>, ""}; };
  atom("add.f32", [](float o, float v, float) { return o + v; });
  atom("add.u32", [](u32 o, u32 v, u32) { return o + v; });
  atom("add.s32", [](u32 o, u32 v, u32) { return o + v; });
  atom("add.u64", [](u64 o, u64 v, u64) { return o + v; });
  atom("exch.b32", [](u32, u32 v, u32) { return v; });
  atom("cas.b32", [](u32 o, u32 v, u32 n) { return o == v ? n : o; });
  atom("max.s32", [](s32 o, s32 v, s32) { return std::max(o, v); });
  atom("max.u32", [](u32 o, u32 v, u32) { return std::max(o, v); });
  atom("min.s32", [](s32 o, s32 v, s32) { return std::min(o, v); });
  atom("min.u32", [](u32 o, u32 v, u32) { return std::min(o, v); });
  atom("or.b32", [](u32 o, u32 v, u32) { return o | v; });
  atom("and.b32", [](u32 o, u32 v, u32) { return o & v; });

  const auto redux = [&]<class F>(const char* name, F) { t[std::string("redux.") + name] = {reduce<F>, ""}; };
  redux("add.s32", [](u32 a, u32 b) { return a + b; });
  redux("add.u32", [](u32 a, u32 b) { return a + b; });
  redux("max.s32", [](s32 a, s32 b) { return std::max(a, b); });
  redux("min.s32", [](s32 a, s32 b) { return std::min(a, b); });
  redux("max.u32", [](u32 a, u32 b) { return std::max(a, b); });
  redux("min.u32", [](u32 a, u32 b) { return std::min(a, b); });
  redux("or.b32", [](u32 a, u32 b) { return a | b; });
  redux("and.b32", [](u32 a, u32 b) { return a & b; });
  redux("xor.b32", [](u32 a, u32 b) { return a ^ b; });
  redux("max.f32", [](float a, float b) { return a != a ? b : b != b ? a : std::max(a, b); });
  redux("min.f32", [](float a, float b) { return a != a ? b : b != b ? a : std::min(a, b); });
}

}  // namespace ptx
