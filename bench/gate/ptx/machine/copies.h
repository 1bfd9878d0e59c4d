// Asynchronous copies: cp.async by lanes, TMA loads and stores by boxes of a tensor map.
#pragma once
#include "barriers.h"

namespace ptx {

// ---- cp.async: writes shared memory at some time between its issue and the wait for its group.

inline void perform(Warp& w, const Copy& c) {
  u8* to = &w.block->shared[shared_offset(*w.block, c.target, c.bytes, "cp.async")];
  std::memset(to, 0, c.bytes);
  if (c.from) std::memcpy(to, global(w, c.source, c.from, Access::READ, "cp.async"), c.from);
}
// Operands: target, source (and bytes that are read). imm: bytes, offsets of both.
inline Step cp_async(Warp& w, const Ins& i) {
  const u32 bytes = u32(i.imm[0]);
  for (int l = 0; l < LANES; ++l) {
    if (!here(w, l)) continue;
    const Copy c{lanes_of<u64>(w, i.op[1])[l] + u64(i.imm[2]),
                 lanes_of<u32>(w, i.op[0])[l] + u32(i.imm[1]), bytes,
                 i.nop > 2 ? lanes_of<u32>(w, i.op[2])[l] : bytes};
    if (c.target % bytes || (c.from && c.source % bytes)) fail("cp.async of %u bytes is misaligned", bytes);
    if (c.from > bytes) fail("cp.async reads %u bytes of %u", c.from, bytes);
    if (c.from) global(w, c.source, c.from, Access::READ, "cp.async");
    note_coming(*w.block, w, shared_offset(*w.block, c.target, bytes, "cp.async"), bytes);
    if (at_once(*w.block)) perform(w, c);
    w.copies.push_back(c);
  }
  return NEXT;
}
inline Step cp_commit(Warp& w, const Ins&) {
  w.copy_groups.push_back(std::move(w.copies));
  w.copies.clear();
  return NEXT;
}
inline Step cp_wait(Warp& w, const Ins& i) {  // imm: groups that may stay
  while (w.copy_groups.size() > size_t(i.imm[0])) {
    for (const Copy& c : w.copy_groups.front()) {
      perform(w, c);
      note_came(*w.block, u32(w.agent), w.clock[size_t(w.agent)], false, c.target - SHARED_BASE, c.bytes);
    }
    w.copy_groups.pop_front();
  }
  return NEXT;
}

// ---- TMA. The map is our own 128 bytes in place of CUDA's opaque ones; tensor_map.py makes it.

struct TensorMap {
  u64 magic, base;
  u64 size[5];
  u64 stride[4];  // bytes
  u32 box[5];
  u8 rank, element, swizzle, nan;  // swizzle: 0, 1: 32, 2: 64, 3: 128 bytes
  u32 row() const { return box[0] * element; }
  u32 bytes() const {
    u32 n = element;
    for (int d = 0; d < rank; ++d) n *= box[d];
    return n;
  }
};
static_assert(sizeof(TensorMap) <= 128);
constexpr u64 TENSOR_MAP = 0x70747876'6d746d61;

// 16-byte units of an address are XORed with bits 7 and up: one, two or three of them.
inline u32 swizzled(u32 address, int mode) { return address ^ (address >> 3 & (((1u << mode) - 1) << 4)); }

inline TensorMap map_at(Cluster& c, u64 address) {
  const u64 offset = address & ~WINDOW;
  if ((address & WINDOW) != PARAM_WINDOW || offset + 128 > c.param_bytes)
    fail("a tensor map outside the parameters");
  if (offset % 64) fail("a tensor map is not aligned to 64 bytes");
  TensorMap map;
  std::memcpy(&map, c.params + offset, sizeof map);
  if (map.magic != TENSOR_MAP) fail("what should be a tensor map is none");
  return map;
}

// Calls each(address or 0, shared offset, bytes) for what of a box lies together: a row's elements
// inside of the tensor, 16 bytes at most.
template <class Each>
void walk(Block& b, const TensorMap& m, const s32* at, u32 shared, Each each) {
  if (shared % 128) fail("TMA: a shared address is not aligned to 128 bytes");
  shared_offset(b, shared, m.bytes(), "TMA box");
  const u32 rows = m.bytes() / m.row();
  for (u32 r = 0; r < rows; ++r) {
    u64 address = m.base;
    bool inside = true;
    u32 rest = r;
    for (int d = 1; d < m.rank; ++d) {
      const s64 c = s64(at[d]) + rest % m.box[d];
      rest /= m.box[d];
      inside = inside && c >= 0 && u64(c) < m.size[d];
      address += u64(c) * m.stride[d - 1];
    }
    for (u32 x = 0; x < m.row(); x += 16) {
      const u32 to = swizzled(shared + r * m.row() + x, m.swizzle) - SHARED_BASE;
      const u32 bytes = std::min(16u, m.row() - x);
      const s64 first = s64(at[0]) * m.element + x;
      const s64 end = s64(m.size[0]) * m.element;
      for (u32 k = 0; k < bytes;) {
        const bool in = inside && first + k >= 0 && first + k < end;
        // As long as elements are on the same side of the tensor's edges.
        u32 n = m.element;
        while (k + n < bytes && (inside && first + k + n >= 0 && first + k + n < end) == in) n += m.element;
        each(in ? address + u64(first + k) : 0, to + k, n);
        k += n;
      }
    }
  }
}
// A tile that begins inside of a tensor may be cut into boxes that lie wholly behind its end, by less
// than the widest tile there is. A box further away, or wholly before the start, was never meant.
constexpr s64 WIDEST = 256;
inline void check_box(const TensorMap& m, int rank, const s32* at, bool load) {
  const char* what = load ? "load" : "store";
  if (m.rank != rank) fail("TMA %s of rank %d through a map of rank %d", what, rank, m.rank);
  if (m.swizzle && m.row() > (16u << m.swizzle))
    fail("TMA: a box row of %u bytes is wider than its swizzle", m.row());
  for (int d = 0; d < rank; ++d) {
    const s64 first = at[d];
    if (first >= s64(m.size[d]) + WIDEST || first + s64(m.box[d]) <= 0)
      fail("TMA %s: dimension %d of the box is %lld to %lld, far outside of %llu", what, d,
           (long long)first, (long long)(first + m.box[d]), (unsigned long long)m.size[d]);
  }
}

template <class Each>
void each_target(Block& b, const Load& load, Each each) {
  if (!load.mask) return each(b);
  for (Block& other : b.cluster->blocks)
    if (load.mask >> other.rank & 1) each(other);
}
inline void perform(Block& issuer, const Load& load) {
  Cluster& c = *issuer.cluster;
  const TensorMap m = map_at(c, load.map);
  Warp& w = issuer.warps[0];
  each_target(issuer, load, [&](Block& b) {
    walk(b, m, load.at, load.shared, [&](u64 from, u32 to, u32 n) {
      if (from)
        std::memcpy(&b.shared[to], global(w, from, n, Access::READ, "TMA load"), n);
      else
        std::memset(&b.shared[to], m.nan ? 0xff : 0, n);
    });
    const u32 now = ++c.copied;
    note_came(b, c.copier(), now, true, load.shared - SHARED_BASE, m.bytes());
    MBarrier& barrier = mbarrier(b, load.mbarrier);
    barrier.bytes -= m.bytes();
    Clock clock(c.agents());
    clock[c.copier()] = now;
    join(barrier.arriving, clock);
    complete(barrier);
  });
}
// Operands: shared, map, mbarrier, coordinates (and the blocks that it goes to). imm: rank.
inline Step tma_load(Warp& w, const Ins& i) {
  const int rank = int(i.imm[0]);
  Block& b = *w.block;
  for (int l = 0; l < LANES; ++l) {
    if (!here(w, l)) continue;
    Load load{lanes_of<u64>(w, i.op[1])[l], lanes_of<u32>(w, i.op[0])[l], lanes_of<u32>(w, i.op[2])[l], 0,
              {}, 0};
    for (int d = 0; d < rank; ++d) load.at[d] = s32(lanes_of<u32>(w, i.op[3 + d])[l]);
    if (i.nop > 3 + rank) {
      load.mask = lanes_of<u16>(w, i.op[3 + rank])[l];
      if (!load.mask || load.mask >> b.cluster->blocks.size())
        fail("TMA multicast to blocks %x of a cluster of %zu", load.mask, b.cluster->blocks.size());
    }
    const TensorMap m = map_at(*b.cluster, load.map);
    check_box(m, rank, load.at, true);
    each_target(b, load, [&](Block& to) {
      known(w, to, load.mbarrier);
      note_coming(to, w, shared_offset(to, load.shared, m.bytes(), "TMA load"), m.bytes());
    });
    if (at_once(b))
      perform(b, load);
    else
      b.loads.push_back(load);
  }
  return NEXT;
}
// To read a box and to write it are one here.
inline void perform(Warp& w, Box& box) {
  if (box.read) return;
  box.read = true;
  const TensorMap m = map_at(*w.block->cluster, box.map);
  walk(*w.block, m, box.at, box.shared, [&](u64 to, u32 from, u32 n) {
    const u8* data = &w.block->shared[from];
    if (to) std::memcpy(global(w, to, n, Access::WRITE, "TMA store", data), data, n);
  });
}
inline Step tma_store(Warp& w, const Ins& i) {  // operands: map, shared, coordinates; imm: rank
  const int rank = int(i.imm[0]);
  for (int l = 0; l < LANES; ++l) {
    if (!here(w, l)) continue;
    Box box{lanes_of<u64>(w, i.op[0])[l], lanes_of<u32>(w, i.op[1])[l], u32(l), {}};
    for (int d = 0; d < rank; ++d) box.at[d] = s32(lanes_of<u32>(w, i.op[2 + d])[l]);
    const TensorMap m = map_at(*w.block->cluster, box.map);
    check_box(m, rank, box.at, false);
    const u32 offset = shared_offset(*w.block, box.shared, m.bytes(), "TMA store");
    note_read(w, offset, m.bytes(), true);
    note_being_read(*w.block, offset, m.bytes(), 1);
    if (at_once(*w.block)) perform(w, box);
    w.boxes.push_back(box);
  }
  return NEXT;
}
inline Step tma_commit(Warp& w, const Ins&) {
  w.box_groups.push_back(std::move(w.boxes));
  w.boxes.clear();
  return NEXT;
}
inline Step tma_wait(Warp& w, const Ins& i) {  // imm: groups that may stay
  while (w.box_groups.size() > size_t(i.imm[0])) {
    for (Box& box : w.box_groups.front()) {
      if (!here(w, int(box.lane))) fail("the lane that issued a TMA store does not wait for it");
      perform(w, box);
      const u32 bytes = map_at(*w.block->cluster, box.map).bytes(), offset = box.shared - SHARED_BASE;
      note_being_read(*w.block, offset, bytes, -1);
      note_read(w, offset, bytes, true);  // whoever writes next must know of this wait
    }
    w.box_groups.pop_front();
  }
  return NEXT;
}

inline void add_copies(Table& t) {
  t["cp.async"] = {cp_async, ""};
  t["cp.commit"] = {cp_commit, ""};
  t["cp.wait"] = {cp_wait, ""};
  t["tma.load"] = {tma_load, ""};
  t["tma.store"] = {tma_store, ""};
  t["tma.commit"] = {tma_commit, ""};
  t["tma.wait"] = {tma_wait, ""};
}

}  // namespace ptx
