// A launch: clusters one after another, the blocks of a cluster at the same time.
#pragma once
#include <tuple>

#include "faults.h"
#include "warp.h"

namespace simt {

inline std::string last_error;

inline std::string identity(const Fiber& fiber) {
  const uint3 b = fiber.block->index, t = fiber.thread;
  return format("block (%u, %u, %u) thread (%u, %u, %u)", b.x, b.y, b.z, t.x, t.y, t.z);
}

inline void thread_exited(Fiber& fiber) {
  leave_warp(fiber);
  leave_barriers(fiber);
}

// One line for every place where threads of a block wait, with their ranges.
[[noreturn]] inline void deadlock() {
  std::vector<std::pair<std::string, std::string>> lines;
  const Fiber* previous = nullptr;
  for (const Fiber& fiber : grid.running->fibers) {
    if (fiber.done) continue;
    const uint3 b = fiber.block->index;
    std::string what = fiber.wait.what ? fiber.wait.what : "nothing";
    if (fiber.wait.detail) what += " (" + fiber.wait.detail(fiber.wait.object) + ")";
    what = format("block (%u, %u, %u) at %s: %s, threads", b.x, b.y, b.z,
                  name(fiber.wait.at).c_str(), what.c_str());
    const bool same = !lines.empty() && lines.back().first == what;
    if (!same) lines.push_back({what, format(" %u", fiber.rank)});
    if (same && previous->rank + 1 != fiber.rank) lines.back().second += format(", %u", fiber.rank);
    if (same && previous->rank + 1 == fiber.rank) {
      std::string& ranges = lines.back().second;
      const size_t dash = ranges.rfind('-'), comma = ranges.rfind(',');
      if (dash != std::string::npos && (comma == std::string::npos || dash > comma)) {
        ranges.resize(dash);
      }
      ranges += format("-%u", fiber.rank);
    }
    previous = &fiber;
  }
  std::string text = "deadlock";
  for (const auto& [what, ranges] : lines) text += "\n  " + what + ranges;
  throw Error(text);
}

class Launch {
 public:
  Launch(dim3 cluster, dim3 blocks, dim3 threads, size_t shared, std::function<void()> body) {
    check(cluster, blocks, threads, shared);
    grid.grid = blocks;
    grid.block = threads;
    grid.cluster = cluster;
    grid.static_shared = StaticShared::find();
    for (unsigned i = 0; i < size(cluster); ++i) {
      shared_.push_back(std::make_unique<SharedMemory>(shared));
    }
    scheduler.body = std::move(body);
  }

  ~Launch() { grid.running.reset(); }

  void run() {
    std::vector<uint64_t> order(size(grid.grid) / size(grid.cluster));
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    if (scheduler.seed == 1) std::reverse(order.begin(), order.end());
    if (scheduler.at_random()) {
      scheduler.begin(~0ull);
      for (size_t i = order.size(); i > 1; --i) {
        std::swap(order[i - 1], order[scheduler.below(unsigned(i))]);
      }
    }
    for (uint64_t index : order) run_cluster(index);
  }

  static uint64_t size(dim3 d) { return uint64_t(d.x) * d.y * d.z; }

 private:
  static void check(dim3 cluster, dim3 blocks, dim3 threads, size_t shared) {
    if (!size(blocks) || blocks.y > 65535 || blocks.z > 65535 || blocks.x > 0x7fffffff) {
      throw Error(format("launch of a grid of (%u, %u, %u) blocks", blocks.x, blocks.y, blocks.z));
    }
    if (!size(threads) || size(threads) > MAX_THREADS || threads.z > 64) {
      throw Error(format("launch of a block of (%u, %u, %u) threads", threads.x, threads.y,
                         threads.z));
    }
    if (!size(cluster) || size(cluster) > 8 || blocks.x % cluster.x || blocks.y % cluster.y ||
        blocks.z % cluster.z) {
      throw Error(format("launch of (%u, %u, %u) blocks in clusters of (%u, %u, %u)", blocks.x,
                         blocks.y, blocks.z, cluster.x, cluster.y, cluster.z));
    }
    if (shared > MAX_SHARED) {
      throw Error(format("launch of %zu bytes of shared memory, a block can have %zu", shared,
                         MAX_SHARED));
    }
  }

  void run_cluster(uint64_t index) {
    const unsigned blocks = unsigned(size(grid.cluster)), threads = unsigned(size(grid.block));
    scheduler.begin(index);
    grid.running = std::make_unique<Cluster>();
    Cluster& cluster = *grid.running;
    cluster.live = blocks * threads;
    cluster.fibers.resize(cluster.live);
    for (unsigned rank = 0; rank < blocks; ++rank) add_block(cluster, index, rank, threads);
    for (size_t i = 0; i < cluster.fibers.size(); ++i) {
      const size_t turn = scheduler.seed == 1 ? cluster.fibers.size() - 1 - i : i;
      scheduler.add(cluster.fibers[turn], turn);
    }
    grid.static_shared.fill();
    faults.guard();
    check_end(blocks);
  }

  void add_block(Cluster& cluster, uint64_t index, unsigned rank, unsigned threads) {
    auto block = std::make_unique<Block>();
    const dim3 c = grid.cluster, clusters(grid.grid.x / c.x, grid.grid.y / c.y, grid.grid.z / c.z);
    block->cluster = &cluster;
    block->rank = rank;
    block->index = {unsigned(index % clusters.x) * c.x + rank % c.x,
                    unsigned(index / clusters.x % clusters.y) * c.y + rank / c.x % c.y,
                    unsigned(index / clusters.x / clusters.y) * c.z + rank / c.x / c.y};
    block->threads = block->live = threads;
    block->shared = shared_[rank].get();
    block->shared->fill();
    block->warps.resize((threads + 31) / 32);
    if (threads % 32) block->warps.back().exited = ~0u << threads % 32;
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& fiber = cluster.fibers[rank * threads + t];
      fiber.block = block.get();
      fiber.rank = t;
      fiber.thread = {t % grid.block.x, t / grid.block.x % grid.block.y,
                      t / grid.block.x / grid.block.y};
    }
    cluster.blocks.push_back(std::move(block));
  }

  void check_end(unsigned blocks) const {
    for (const auto& block : grid.running->blocks) {
      for (const auto check : block->at_end) check(*block);
      if (!block->shared->margins_unwritten()) {
        throw Error(format("block (%u, %u, %u) wrote beside its %zu bytes of dynamic shared memory",
                           block->index.x, block->index.y, block->index.z,
                           block->shared->bytes()));
      }
    }
    if (blocks > 1 && !grid.static_shared.unwritten()) {
      throw Error("__shared__ variables in a kernel with clusters: its blocks would have them in "
                  "common here, take dynamic shared memory");
    }
  }

  std::vector<std::unique_ptr<SharedMemory>> shared_;
};

// Where launches go instead, if a test says so: to what runs the same kernel in another way. dims: of
// cluster, grid and block. Each argument and its bytes. 0 on success.
using Elsewhere = int (*)(const void* kernel, const unsigned* dims, size_t shared,
                          const void* const* arguments, const size_t* bytes, int count);
inline Elsewhere elsewhere = nullptr;

template <class... Values>
bool sent_elsewhere(const void* kernel, dim3 cluster, dim3 blocks, dim3 threads, size_t shared,
                    const Values&... values) {
  const unsigned dims[] = {cluster.x, cluster.y, cluster.z, blocks.x, blocks.y,
                           blocks.z,  threads.x, threads.y, threads.z};
  const void* const arguments[] = {&values...};
  const size_t bytes[] = {sizeof values...};
  return elsewhere(kernel, dims, shared, arguments, bytes, int(sizeof...(Values))) == 0;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(dim3 cluster, void (*kernel)(Parameters...), dim3 blocks, dim3 threads,
                   size_t shared, Arguments&&... arguments) {
  try {
    const std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
    if (elsewhere) {
      const bool done = std::apply(
          [&](const auto&... each) {
            return sent_elsewhere(reinterpret_cast<const void*>(kernel), cluster, blocks, threads,
                                  shared, each...);
          },
          values);
      return done ? cudaSuccess : cudaErrorLaunchFailure;
    }
    Launch(cluster, blocks, threads, shared, [&] { std::apply(kernel, values); }).run();
    return cudaSuccess;
  } catch (const std::exception& error) {
    if (last_error.empty()) last_error = error.what();
    return cudaErrorLaunchFailure;
  }
}

}  // namespace simt

// For the test's side of the library.
extern "C" {
__attribute__((used)) inline void simt_begin(uint64_t seed, double seconds) {
  simt::scheduler.seed = seed;
  simt::scheduler.seconds = seconds;
  simt::last_error.clear();
}
__attribute__((used)) inline void simt_elsewhere(simt::Elsewhere where) { simt::elsewhere = where; }
__attribute__((used)) inline const char* simt_error() {
  return simt::last_error.c_str();
}
}
