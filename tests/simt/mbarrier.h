// mbarriers: 64 bits of shared memory that count arrivals and bytes, one phase after another.
#pragma once
#include <unordered_map>

#include "barriers.h"

namespace simt {

constexpr int64_t MBARRIER_LIMIT = (1 << 20) - 1;  // of arrivals and of bytes, either way

struct MBarrier {
  uint32_t arrivals = 0, pending = 0;
  int64_t bytes = 0;  // expected and not yet there
  uint64_t phase = 0;
  uint64_t content = 0;  // what the 64 bits hold, so that a write over them is found
  const Fiber* initialiser = nullptr;
  bool fenced = false;
  bool counts_bytes = false;
  Site passed{};           // a wait that no phase had to complete for
  bool committed = false;  // tcgen05_commit arrives at it
  std::vector<Fiber*> waiting;
};

using MBarriers = std::unordered_map<const void*, MBarrier>;  // of one block

inline std::string mbarrier_state(const void* object) {
  const auto* barrier = static_cast<const MBarrier*>(object);
  return format("parity %u; %u of %u arrivals and %lld bytes are missing",
                unsigned(barrier->phase & 1), barrier->pending, barrier->arrivals,
                static_cast<long long>(barrier->bytes));
}

inline MBarrier& mbarrier(Block& block, const uint64_t* at_address) {
  auto& all = block.parts.get<MBarriers>();
  const auto found = all.find(at_address);
  if (found == all.end()) fail("the mbarrier is not initialised");
  if (*at_address != found->second.content) fail("the mbarrier has been overwritten");
  return found->second;
}

inline void init_mbarrier(uint64_t* bar, uint32_t arrivals, Site at) {
  if (uintptr_t(bar) % 8) fail(at, "the mbarrier is not aligned to 8 bytes");
  if (!in_shared(bar, 8)) fail(at, "the mbarrier is not in shared memory of this block");
  if (arrivals < 1 || arrivals > MBARRIER_LIMIT) {
    fail(at, format("an mbarrier of %u arrivals", arrivals));
  }
  auto& all = self().block->parts.get<MBarriers>();
  if (all.count(bar)) fail(at, "the mbarrier is initialised already");
  MBarrier& made = all[bar];
  made.arrivals = made.pending = arrivals;
  made.initialiser = &self();
  made.content = 0x5eed0000b0000000 + all.size();
  *bar = made.content;
}

inline void fence_mbarriers() {
  for (auto& [address, barrier] : self().block->parts.get<MBarriers>()) {
    if (barrier.initialiser == &self()) barrier.fenced = true;
  }
}

inline void complete_phase(MBarrier& barrier) {
  if (barrier.pending || barrier.bytes) return;
  ++barrier.phase;
  barrier.pending = barrier.arrivals;
  scheduler.wake(barrier.waiting);
}

// A producer may pass an `empty` barrier before its first phase; nobody may pass a `full` one.
inline void check_first_phase(const MBarrier& barrier) {
  if (!barrier.counts_bytes || !barrier.passed.file) return;
  fail("an mbarrier that counts bytes was passed before its first phase had completed, by the "
       "barrier_wait for parity 1 at " + name(barrier.passed));
}

inline void expect_bytes(MBarrier& barrier, int64_t bytes) {
  barrier.counts_bytes = true;
  check_first_phase(barrier);
  barrier.bytes += bytes;
  if (barrier.bytes > MBARRIER_LIMIT || barrier.bytes < -MBARRIER_LIMIT) {
    fail(format("an mbarrier with %lld bytes to come", static_cast<long long>(barrier.bytes)));
  }
}

inline void arrive_at(MBarrier& barrier) {
  if (barrier.pending == 0) {
    fail(format("more than the %u arrivals of an mbarrier's phase", barrier.arrivals));
  }
  --barrier.pending;
  complete_phase(barrier);
}

// What TMA, tensor cores and other blocks reach must have been fenced after its initialisation.
inline MBarrier& fenced_mbarrier(Block& block, const uint64_t* bar) {
  MBarrier& barrier = mbarrier(block, bar);
  if (!barrier.fenced) fail("no barrier_init_fence since the mbarrier's initialisation");
  return barrier;
}

// The same place in another block of the cluster.
template <class T>
T* in_block(T* pointer, uint32_t rank) {
  Block& own = *self().block;
  if (rank >= own.cluster->blocks.size()) fail(format("the cluster has no block %u", rank));
  Block& other = *own.cluster->blocks[rank];
  if (!other.live) fail(format("block %u of the cluster has finished", rank));
  if (&other == &own) return pointer;
  if (!own.shared->holds(pointer, 1)) fail("a place outside dynamic shared memory is not shared");
  const ptrdiff_t offset = reinterpret_cast<const char*>(pointer) - own.shared->data();
  return reinterpret_cast<T*>(other.shared->data() + offset);
}

inline void wait_mbarrier(uint64_t* bar, uint32_t parity, Site at) {
  if (parity > 1) fail(at, format("barrier_wait for parity %u", parity));
  MBarrier& barrier = mbarrier(*enter(at).block, bar);
  scheduler.perturb();
  if (barrier.phase == 0 && parity == 1) {
    barrier.passed = at;
    check_first_phase(barrier);
  }
  while ((barrier.phase & 1) == parity) {
    barrier.waiting.push_back(&self());
    scheduler.block({"barrier_wait", at, mbarrier_state, &barrier});
  }
  self().behind_commit |= barrier.committed;
}

}  // namespace simt

namespace fusedmlp {

inline void barrier_init(uint64_t* bar, uint32_t arrivals, simt::Site at = simt::Site::here()) {
  simt::init_mbarrier(bar, arrivals, at);
}
inline void barrier_init_fence() { simt::fence_mbarriers(); }

inline void barrier_expect(uint64_t* bar, uint32_t bytes, simt::Site at = simt::Site::here()) {
  simt::MBarrier& barrier = simt::mbarrier(*simt::enter(at).block, bar);
  simt::expect_bytes(barrier, bytes);
  simt::arrive_at(barrier);
  simt::scheduler.perturb();
}
inline void barrier_arrive(uint64_t* bar, simt::Site at = simt::Site::here()) {
  simt::arrive_at(simt::mbarrier(*simt::enter(at).block, bar));
  simt::scheduler.perturb();
}
inline void barrier_arrive(uint64_t* bar, uint32_t cta, simt::Site at = simt::Site::here()) {
  simt::Block& block = *simt::enter(at).block;
  uint64_t* there = simt::in_block(bar, cta);
  simt::arrive_at(cta == block.rank ? simt::mbarrier(block, bar)
                                    : simt::fenced_mbarrier(*block.cluster->blocks[cta], there));
  simt::scheduler.perturb();
}
inline void barrier_wait(uint64_t* bar, uint32_t parity, simt::Site at = simt::Site::here()) {
  simt::wait_mbarrier(bar, parity, at);
}

}  // namespace fusedmlp
