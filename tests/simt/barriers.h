// Barriers of a block and of a cluster.
#pragma once
#include "block.h"

namespace simt {

inline std::string barrier_state(const void* object) {
  const auto* barrier = static_cast<const Barrier*>(object);
  return format("%u of %u threads have arrived", barrier->arrived, barrier->expected);
}

inline void release(Barrier& barrier) {
  for (Fiber* fiber : barrier.waiting) fiber->result = barrier.votes;
  std::vector<Fiber*> waiting;
  waiting.swap(barrier.waiting);
  barrier = Barrier();
  scheduler.wake(waiting);
}

inline void arrive(Barrier& barrier, unsigned expected, const char* what, Site at) {
  Fiber& fiber = self();
  if (barrier.arrived && barrier.expected != expected) {
    fail(at, format("%s of %u threads meets one of %u threads at %s", what, expected,
                    barrier.expected, name(barrier.at).c_str()));
  }
  if (barrier.by[fiber.rank]) fail(at, format("%s: the thread has already arrived", what));
  barrier.expected = expected;
  barrier.at = at;
  barrier.by[fiber.rank] = true;
  ++barrier.arrived;
}

// Every thread of the block that has not returned.
inline int sync_block(const char* what, int vote, Site at) {
  Block& block = *self().block;
  Barrier& barrier = block.barriers[0];
  if (barrier.arrived && (barrier.at.line != at.line || std::strcmp(barrier.at.file, at.file))) {
    fail(at, format("%s meets another barrier of the block, at %s", what,
                    name(barrier.at).c_str()));
  }
  arrive(barrier, block.live, what, at);
  barrier.votes += vote != 0;
  barrier.waiting.push_back(&self());
  if (barrier.arrived == block.live) {
    release(barrier);
    scheduler.take_turn();
  } else {
    scheduler.block({what, at, barrier_state, &barrier});
  }
  return self().result;
}

inline Barrier& named_barrier(int id, int threads, Site at) {
  if (id < 0 || id > 15) fail(at, format("there is no barrier %d", id));
  if (threads <= 0 || threads % 32 || unsigned(threads) > MAX_THREADS) {
    fail(at, format("a named barrier counts whole warps, got %d threads", threads));
  }
  return self().block->barriers[id];
}

inline void sync_named(int id, int threads, Site at) {
  Barrier& barrier = named_barrier(id, threads, at);
  arrive(barrier, unsigned(threads), "named barrier", at);
  barrier.waiting.push_back(&self());
  if (barrier.arrived == barrier.expected) {
    release(barrier);
    scheduler.take_turn();
  } else {
    scheduler.block({"named barrier", at, barrier_state, &barrier});
  }
}

inline void arrive_named(int id, int threads, Site at) {
  Barrier& barrier = named_barrier(id, threads, at);
  arrive(barrier, unsigned(threads), "named barrier", at);
  if (barrier.arrived == barrier.expected) release(barrier);
}

struct ClusterArrival {
  bool pending = false;
  uint64_t phase = 0;
};

inline std::string cluster_barrier_state(const void* object) {
  const auto* cluster = static_cast<const Cluster*>(object);
  return format("%u of %u threads have arrived", cluster->barrier.arrived, cluster->live);
}

inline void try_release(Cluster& cluster) {
  if (!cluster.barrier.arrived || cluster.barrier.arrived < cluster.live) return;
  cluster.barrier.arrived = 0;
  ++cluster.barrier.phase;
  scheduler.wake(cluster.barrier.waiting);
}

inline void arrive_cluster(Site at) {
  Cluster& cluster = *self().block->cluster;
  auto& arrival = self().parts.get<ClusterArrival>();
  if (arrival.pending) fail(at, "cluster_arrive twice without cluster_wait");
  arrival = {true, cluster.barrier.phase};
  ++cluster.barrier.arrived;
  try_release(cluster);
}

inline void wait_cluster(Site at) {
  Cluster& cluster = *self().block->cluster;
  auto& arrival = self().parts.get<ClusterArrival>();
  if (!arrival.pending) fail(at, "cluster_wait without cluster_arrive");
  arrival.pending = false;
  if (cluster.barrier.phase != arrival.phase) return;
  cluster.barrier.waiting.push_back(&self());
  scheduler.block({"cluster_wait", at, cluster_barrier_state, &cluster});
}

// A thread that has returned no longer counts.
inline void leave_barriers(Fiber& fiber) {
  Block& block = *fiber.block;
  Barrier& barrier = block.barriers[0];
  --block.live;
  if (!barrier.waiting.empty() && barrier.expected == block.live + 1) {
    barrier.expected = block.live;
    if (barrier.arrived == block.live) release(barrier);
  }
  --block.cluster->live;
  try_release(*block.cluster);
}

}  // namespace simt

inline void __syncthreads(simt::Site at = simt::Site::here()) {
  simt::sync_block("__syncthreads", 0, at);
}
inline int __syncthreads_count(int predicate, simt::Site at = simt::Site::here()) {
  return simt::sync_block("__syncthreads_count", predicate, at);
}
inline int __syncthreads_or(int predicate, simt::Site at = simt::Site::here()) {
  return simt::sync_block("__syncthreads_or", predicate, at) != 0;
}
inline int __syncthreads_and(int predicate, simt::Site at = simt::Site::here()) {
  return simt::sync_block("__syncthreads_and", !predicate, at) == 0;
}

namespace fusedmlp {

inline void named_sync(int id, int threads, simt::Site at = simt::Site::here()) {
  simt::sync_named(id, threads, at);
}
inline void named_arrive(int id, int threads, simt::Site at = simt::Site::here()) {
  simt::arrive_named(id, threads, at);
}

inline uint32_t cluster_rank() { return simt::self().block->rank; }
inline uint32_t cluster_size() { return uint32_t(simt::self().block->cluster->blocks.size()); }
inline void cluster_arrive(simt::Site at = simt::Site::here()) { simt::arrive_cluster(at); }
inline void cluster_wait(simt::Site at = simt::Site::here()) { simt::wait_cluster(at); }

}  // namespace fusedmlp
