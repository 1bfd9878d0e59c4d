// Barriers of a block and of a cluster, mbarriers, fences.
#pragma once
#include "memory.h"

namespace ptx {

// Who waits at `arriving` will know what `w` knows now, but not what it does from now on.
inline void release(Warp& w, Clock& arriving) {
  join(arriving, w.clock);
  ++w.clock[size_t(w.agent)];
}

// A barrier opens when as many warps have come as it needs; those that have left count too where it
// names no number.
inline void open_if_full(Block& b, Barrier& barrier) {
  u32 need = barrier.need;
  if (!need)
    for (const Warp& w : b.warps) need += w.state != Warp::DONE;
  if (barrier.warps.empty() || barrier.warps.size() + barrier.arrived.size() < need) return;
  for (Warp* w : barrier.warps) {
    join(w->clock, barrier.arriving);
    w->state = Warp::READY;
  }
  barrier.warps.clear();
  barrier.arrived.clear();
  barrier.arriving.clear();
}

template <bool WAITS>  // bar.sync, bar.arrive. Operands: the barrier (and the number of threads)
Step block_barrier(Warp& w, const Ins& i) {
  const u32 id = *lanes_of<u32>(w, i.op[0]);
  if (id > 15) fail("barrier %u: a block has 16", id);
  const u32 threads = i.nop > 1 ? *lanes_of<u32>(w, i.op[1]) : 0;
  if (threads % LANES) fail("barrier %u for %u threads, which are no whole warps", id, threads);
  Barrier& b = w.block->barriers[id];
  if (b.warps.empty() && b.arrived.empty()) b.need = threads / LANES;
  if (b.need != threads / LANES)
    fail("barrier %u is asked for %u threads and, before, for %u", id, threads, b.need * LANES);
  for (const Warp* other : b.arrived)
    if (other == &w) fail("a warp comes to barrier %u twice", id);
  release(w, b.arriving);
  if (!WAITS) {
    b.arrived.push_back(&w);
    open_if_full(*w.block, b);
    return NEXT;
  }
  b.warps.push_back(&w);
  w.state = Warp::BARRIER;
  w.waits_for = id;
  ++w.pc;
  open_if_full(*w.block, b);
  return w.state == Warp::READY ? JUMP : WAIT;
}

inline void pass_cluster(Warp& w) {
  join(w.clock, w.block->cluster->passed);
  w.cluster = Warp::AWAY;
  w.state = Warp::READY;
}
// It opens when every live warp has arrived. No warp arrives again before it has waited, so all have
// passed before it opens the next time.
inline void open_cluster(Cluster& c) {
  for (Block& b : c.blocks)
    for (Warp& w : b.warps)
      if (w.state != Warp::DONE && w.cluster != Warp::ARRIVED) return;
  c.passed = std::exchange(c.arriving, {});
  for (Block& b : c.blocks)
    for (Warp& w : b.warps) {
      if (w.state == Warp::DONE) continue;
      w.cluster = Warp::PASSED;
      if (w.state == Warp::CLUSTER) pass_cluster(w);
    }
}
inline Step cluster_arrive(Warp& w, const Ins&) {
  if (w.cluster != Warp::AWAY) fail("a warp arrives at the cluster's barrier twice");
  w.cluster = Warp::ARRIVED;
  release(w, w.block->cluster->arriving);
  open_cluster(*w.block->cluster);
  return NEXT;
}
inline Step cluster_wait(Warp& w, const Ins&) {
  if (w.cluster == Warp::AWAY) fail("barrier.cluster.wait without an arrive before it");
  ++w.pc;
  if (w.cluster == Warp::PASSED) {
    pass_cluster(w);
    return JUMP;
  }
  w.state = Warp::CLUSTER;
  return WAIT;
}

// ---- mbarriers

inline MBarrier& mbarrier(Block& b, u32 address) {
  const auto found = b.mbarriers.find(address);
  if (found == b.mbarriers.end()) fail("no mbarrier at shared offset %d", int(address - SHARED_BASE));
  return found->second;
}
// One that `w` may use: its init happened before.
inline MBarrier& known(Warp& w, Block& b, u32 address) {
  MBarrier& m = mbarrier(b, address);
  const u32 by = agent_of(m.born);
  if (by != u32(w.agent) && clock_of(m.born) > w.clock[by])
    fail("the mbarrier at shared offset %d is used, not ordered after its init by warp %u",
         int(address - SHARED_BASE), by);
  return m;
}
inline void complete(MBarrier& m) {
  if (m.pending || m.bytes) return;
  ++m.phase;
  m.pending = m.count;
  join(m.clock, m.arriving);
}
inline void arrive(MBarrier& m, const Clock& clock, s64 bytes, u32 count = 1) {
  if (m.pending < count) fail("more arrivals at an mbarrier than its %u", m.count);
  join(m.arriving, clock);
  m.bytes += bytes;
  m.pending -= count;
  complete(m);
}

inline u32 address_with_offset(Warp& w, const Ins& i, int op, int lane) {
  return lanes_of<u32>(w, i.op[op])[lane] + u32(i.imm[0]);
}

inline Step mbarrier_init(Warp& w, const Ins& i) {  // operands: address, count
  for (int l = 0; l < LANES; ++l) {
    if (!here(w, l)) continue;
    const u32 address = address_with_offset(w, i, 0, l), n = lanes_of<u32>(w, i.op[1])[l];
    if (address % 8) fail("an mbarrier is not aligned to 8 bytes");
    if (!n || n >= 1u << 20) fail("an mbarrier for %u arrivals", n);
    const u32 offset = shared_offset(*w.block, address, 8, "mbarrier.init");
    note_write(w, offset, 8);
    if (w.block->mbarriers.count(address)) fail("an mbarrier is initialised twice");
    MBarrier& m = w.block->mbarriers[address];
    m.count = m.pending = n;
    m.born = moment(w.agent, w.clock[w.agent]);
  }
  return NEXT;
}
inline Step mbarrier_inval(Warp& w, const Ins& i) {
  for (int l = 0; l < LANES; ++l) {
    if (!here(w, l)) continue;
    const u32 address = address_with_offset(w, i, 0, l);
    if (known(w, *w.block, address).bytes) fail("an mbarrier that still expects bytes is invalidated");
    w.block->mbarriers.erase(address);
  }
  return NEXT;
}
// Operands: address (and bytes to expect). imm: offset, does it arrive, is the count an operand.
inline Step mbarrier_arrive(Warp& w, const Ins& i) {
  for (int l = 0; l < LANES; ++l) {
    if (!here(w, l)) continue;
    u32 address = address_with_offset(w, i, 0, l);
    Block& b = block_of(w, address);
    MBarrier& m = known(w, b, address);
    const u32 number = i.nop > 1 ? lanes_of<u32>(w, i.op[1])[l] : 0;
    const s64 bytes = i.imm[2] ? 0 : s64(number);
    if (i.imm[1]) {
      arrive(m, w.clock, bytes, i.imm[2] ? number : 1);
      ++w.clock[size_t(w.agent)];
    } else {
      m.bytes += bytes;
    }
  }
  return NEXT;
}
// Operands: predicate, address, parity. It may say no at any time, so who does not ask again is found:
// the first answer is no.
inline Step mbarrier_try_wait(Warp& w, const Ins& i) {
  const int lane = std::countr_zero(w.m);
  const u32 address = address_with_offset(w, i, 1, lane), parity = lanes_of<u32>(w, i.op[2])[lane];
  for (int l = 0; l < LANES; ++l)
    if (here(w, l) && (address_with_offset(w, i, 1, l) != address || lanes_of<u32>(w, i.op[2])[l] != parity))
      fail("lanes of one warp wait for different phases: not modelled");
  MBarrier& m = known(w, *w.block, address);
  if ((m.phase & 1) == parity) {
    if (w.polled != w.pc) {
      w.polled = w.pc;
      set_mask(w, i.op[0], 0);
      return NEXT;
    }
    w.state = Warp::MBARRIER;
    w.waits_for = address;
    w.parity = parity;
    return WAIT;
  }
  w.polled = -1;
  join(w.clock, m.clock);
  set_mask(w, i.op[0], ALL);
  return NEXT;
}

inline Step nothing(Warp&, const Ins&) { return NEXT; }

inline void add_barriers(Table& t) {
  t["bar.sync"] = {block_barrier<true>, ""};
  t["bar.arrive"] = {block_barrier<false>, ""};
  t["cluster.arrive"] = {cluster_arrive, ""};
  t["cluster.wait"] = {cluster_wait, ""};
  t["mbarrier.init"] = {mbarrier_init, ""};
  t["mbarrier.inval"] = {mbarrier_inval, ""};
  t["mbarrier.arrive"] = {mbarrier_arrive, ""};
  t["mbarrier.try_wait"] = {mbarrier_try_wait, ""};
  t["nothing"] = {nothing, ""};
  t["fence.proxy"] = {[](Warp& w, const Ins&) -> Step {
                        fence_proxy(w);
                        return NEXT;
                      },
                      ""};
}

}  // namespace ptx
