// Global and shared memory: bounds, what was never written, and races.
#pragma once
#include "state.h"

namespace ptx {

// ---- global memory

inline size_t region_of(Warp& w, u64 address, u32 bytes, const char* what) {
  static thread_local size_t last = 0;
  const auto& all = *w.block->cluster->regions;
  const auto holds = [&](const Region& r) { return address >= r.begin && address + bytes <= r.end; };
  if (last < all.size() && holds(all[last])) return last;
  const Region *near = nullptr, *next = nullptr;
  for (size_t k = 0; k < all.size(); ++k) {
    if (holds(all[k])) return last = k;
    if (all[k].begin <= address && (!near || all[k].begin > near->begin)) near = &all[k];
    if (all[k].begin > address && (!next || all[k].begin < next->begin)) next = &all[k];
  }
  if (address >> 32 == 0 || (!near && !next))
    fail("global %s of %u bytes at 0x%llx, where no tensor is", what, bytes, (unsigned long long)address);
  if (next && (!near || next->begin - address < address - std::min(address, near->end)))
    fail("global %s of %u bytes begins %llu bytes before argument %d", what, bytes,
         (unsigned long long)(next->begin - address), next->name);
  fail("global %s of %u bytes ends %lld bytes past the end of argument %d", what, bytes,
       (long long)(address + bytes - near->end), near->name);
}

enum class Access { READ, WRITE, ATOMIC };

// Blocks of a launch are in no order, so what one writes no other may touch, be it with the same value:
// it would be work done twice. Warps of one block are ordered by its barriers, and may all write a value
// that they hold copies of; `data` is what is written.
inline u8* global(Warp& w, u64 address, u32 bytes, Access access, const char* what,
                  const void* data = nullptr) {
  Cluster& c = *w.block->cluster;
  const size_t k = region_of(w, address, bytes, what);
  Region& region = (*c.regions)[k];
  u8* host = region.host + (address - region.begin);
  if (region.written) {
    u8* written = region.written + (address - region.begin);
    if (access == Access::WRITE)
      std::memset(written, 1, bytes);
    else
      for (u32 n = 0; n < bytes; ++n)
        if (!written[n])
          fail("global %s: byte %lld of argument %d, which nothing has written", what,
               (long long)(address - region.begin + n), region.name);
  }
  if (!c.options.races) return host;
  const u32 size = c.global_granule, me = w.block->index + 1;
  auto& touches = (*c.touches)[k];
  const u64 base = region.begin / size;
  const u64 first = address / size - base, end = (address + bytes - 1) / size - base;
  for (u64 g = first; g <= end; ++g) {
    Touch& t = touches[g];
    const bool read = access == Access::READ, atomic = access == Access::ATOMIC;
    const bool both_atomic = atomic && t.atomic;
    const auto name = [&](u32 other, const char* did) {
      fail("race: global %s by block %u at byte %lld of argument %d, which block %u %s", what, me - 1,
           (long long)(g * size), region.name, other - 1, did);
    };
    const bool same = data && !std::memcmp(host, data, bytes);
    if (t.writer && t.writer != me && !both_atomic) name(t.writer, "writes");
    if (t.writer == me && !both_atomic && !same) {
      const u32 by = agent_of(t.moment);
      if (by != u32(w.agent) && clock_of(t.moment) > w.clock[by])
        fail("race: global %s by warp %d at byte %lld of argument %d, not ordered after warp %u's write",
             what, w.id, (long long)(g * size), region.name, by);
    }
    if (!read && t.reader && t.reader != me) {
      if (t.reader == MANY)
        fail("race: global %s by block %u at byte %lld of argument %d, which several blocks read", what,
             me - 1, (long long)(g * size), region.name);
      name(t.reader, "reads");
    }
    if (read) t.reader = !t.reader || t.reader == me ? me : MANY;
    if (!read) t.writer = me, t.moment = moment(w.agent, w.clock[w.agent]), t.atomic = atomic;
  }
  return host;
}

// ---- shared memory

inline u32 shared_offset(Block& b, u32 address, u32 bytes, const char* what) {
  const u32 offset = address - SHARED_BASE;
  if (offset > b.shared.size() || offset + bytes > b.shared.size()) {
    fail("shared %s of %u bytes at offset %d of %zu", what, bytes, int(offset), b.shared.size());
  }
  return offset;
}

// The block that a shared::cluster address lies in; the address becomes its own.
inline Block& block_of(Warp& w, u32& address) {
  const u32 rank = address >> RANK_BIT;
  if (!rank) return *w.block;
  auto& blocks = w.block->cluster->blocks;
  if (rank > blocks.size()) fail("a shared address of block %u in a cluster of %zu", rank - 1, blocks.size());
  address &= (1u << RANK_BIT) - 1;
  return blocks[rank - 1];
}

template <class Each>
inline void granules(Block& b, u32 offset, u32 bytes, Each each) {
  const u32 size = b.cluster->granule;
  for (u32 g = offset / size, end = (offset + bytes - 1) / size; g <= end; ++g) each(g, b.shadow[g]);
}

[[noreturn]] inline void shared_race(Block& b, u32 g, const char* what, u32 agent, u32 other,
                                     const char* did) {
  const auto who = [&](u32 a) {
    return a == b.cluster->copier()        ? std::string("a TMA load")
           : a == b.cluster->tensor_core() ? std::string("a tcgen05 product")
                                           : "warp " + std::to_string(a);
  };
  fail("race: shared %s at offset %u by %s, not ordered after the %s of %s", what, g * b.cluster->granule,
       who(agent).c_str(), did, who(other).c_str());
}

// A read by `w`. proxy: by TMA or a tensor core, to which ordinary writes must be fenced.
inline void note_read(Warp& w, u32 offset, u32 bytes, bool proxy = false) {
  Block& b = *w.block;
  if (!b.cluster->options.races) return;
  const u32 agents = b.cluster->agents(), me = u32(w.agent);
  granules(b, offset, bytes, [&](u32 g, Shadow& s) {
    const u32 size = b.cluster->granule;
    if (s.coming) fail("shared offset %u is read while an asynchronous copy still writes it", g * size);
    if (!s.defined) fail("shared offset %u is read, which nothing has written", g * size);
    const u32 by = agent_of(s.written);
    if (by != me && clock_of(s.written) > w.clock[by] && !(s.alike >> me & 1)) {
      shared_race(b, g, "read", me, by, "write");
    }
    if (proxy && s.unfenced) {
      fail("the async proxy reads shared offset %u, which warp %d wrote with no fence.proxy.async since",
           g * size, s.unfenced - 1);
    }
    b.read[size_t(g) * agents + me] = w.clock[me];
  });
}

// May `w` write there now? data: what is written, if that is known. Warps that hold copies of a value
// may all write it. Returns through each(g, shadow, alike).
template <class Each>
inline void check_write(Block& b, const Clock& clock, u32 me, u32 offset, u32 bytes, const void* data,
                        Each each) {
  const u32 agents = b.cluster->agents(), size = b.cluster->granule;
  granules(b, offset, bytes, [&](u32 g, Shadow& s) {
    if (s.coming) fail("shared offset %u is written while an asynchronous copy still writes it", g * size);
    if (s.being_read)
      fail("shared offset %u is written while something asynchronous still reads it", g * size);
    const u32 by = agent_of(s.written);
    if (by != me && clock_of(s.written) > clock[by]) {
      const u32 from = std::max(g * size, offset), end = std::min((g + 1) * size, offset + bytes);
      if (!data || std::memcmp(&b.shared[from], static_cast<const u8*>(data) + (from - offset), end - from)) {
        shared_race(b, g, "write", me, by, "write");
      }
      s.alike |= u64(1) << me;
      return;
    }
    const u32* read = &b.read[size_t(g) * agents];
    for (u32 o = 0; o < agents; ++o) {
      if (read[o] > clock[o] && o != me) shared_race(b, g, "write", me, o, "read");
    }
    s.alike = 0;
    each(s);
  });
}

inline void note_write(Warp& w, u32 offset, u32 bytes, const void* data = nullptr) {
  Block& b = *w.block;
  if (!b.cluster->options.races) return;
  check_write(b, w.clock, u32(w.agent), offset, bytes, data, [&](Shadow& s) {
    s.written = moment(w.agent, w.clock[w.agent]);
    s.unfenced = u8(w.id + 1);
    s.defined = 1;
  });
}

// An asynchronous copy is issued: until it is done nobody may read or write its target.
inline void note_coming(Block& b, Warp& w, u32 offset, u32 bytes) {
  if (b.cluster->options.races)
    check_write(b, w.clock, u32(w.agent), offset, bytes, nullptr, [](Shadow& s) { s.coming = 1; });
  std::memset(&b.shared[offset], POISON, bytes);
}
// It is done: by `agent`, at its clock.
inline void note_came(Block& b, u32 agent, u32 clock, bool fenced, u32 offset, u32 bytes) {
  if (!b.cluster->options.races) return;
  granules(b, offset, bytes, [&](u32, Shadow& s) {
    s.coming = 0;
    s.written = moment(agent, clock);
    s.alike = 0;
    s.unfenced = fenced ? 0 : u8(agent + 1);
    s.defined = 1;
  });
}
inline void note_being_read(Block& b, u32 offset, u32 bytes, int by) {
  if (b.cluster->options.races)
    granules(b, offset, bytes, [&](u32, Shadow& s) { s.being_read = u16(s.being_read + by); });
}

// A proxy fence counts for every write that happened before it.
inline void fence_proxy(Warp& w) {
  for (Shadow& s : w.block->shadow) {
    if (!s.unfenced) continue;
    const u32 by = agent_of(s.written);
    if (by == u32(w.agent) || clock_of(s.written) <= w.clock[by]) s.unfenced = 0;
  }
}

}  // namespace ptx
