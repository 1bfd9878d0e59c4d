// A block, its shared memory and its barriers; a cluster is the blocks that are alive together.
#pragma once
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <bitset>

#include "scheduler.h"

namespace simt {

constexpr unsigned MAX_THREADS = 1024;
constexpr size_t MAX_SHARED = 232448;     // sm_90 and sm_100: what one block can have
constexpr uint32_t SHARED_BASE = 1024;    // the first bytes of the window belong to the system
constexpr size_t SHARED_ALIGNMENT = 1024;
constexpr int UNWRITTEN = 0xff;           // a NaN in every floating-point format

// Dynamic shared memory between two pages that fault. What alignment leaves free on either side
// keeps UNWRITTEN, and is looked at when the block has finished.
class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes) : bytes_(bytes) {
    const size_t page = getpagesize();
    const size_t inside = round_up(round_up(std::max<size_t>(bytes, 1), SHARED_ALIGNMENT), page);
    mapped_ = inside + 2 * page;
    void* base = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) throw std::bad_alloc();
    first_ = static_cast<char*>(base) + page;
    last_ = first_ + inside;
    if (mprotect(first_, inside, PROT_READ | PROT_WRITE)) throw std::bad_alloc();
    data_ = last_ - round_up(std::max<size_t>(bytes, 1), SHARED_ALIGNMENT);
  }
  ~SharedMemory() { munmap(first_ - getpagesize(), mapped_); }
  SharedMemory(const SharedMemory&) = delete;

  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  void fill() { std::memset(first_, UNWRITTEN, last_ - first_); }
  bool holds(const void* pointer, size_t bytes) const {
    const char* p = static_cast<const char*>(pointer);
    return p >= data_ && p + bytes <= data_ + bytes_;
  }
  bool margins_unwritten() const {
    const auto written = [](char byte) { return byte != char(UNWRITTEN); };
    return std::none_of(first_, data_, written) &&
           std::none_of(data_ + bytes_, last_, written);
  }

 private:
  static size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

  size_t bytes_, mapped_;
  char *first_, *last_, *data_;
};

// `__shared__` variables are thread-local ones of this library (the runner itself has no others but
// `anchor`), which gives them a range that can be filled.
struct StaticShared {
  char* data = nullptr;
  size_t bytes = 0;

  static StaticShared find() {
    static thread_local char anchor;
    asm volatile("" : : "r"(&anchor) : "memory");  // allocates this thread's range
    StaticShared found;
    dl_iterate_phdr(&StaticShared::visit, &found);
    return found;
  }
  void fill() const { std::memset(data, UNWRITTEN, bytes); }
  bool holds(const void* pointer, size_t count) const {
    const char* p = static_cast<const char*>(pointer);
    return p >= data && p + count <= data + bytes;
  }
  bool unwritten() const {
    return std::all_of(data, data + bytes, [](char byte) { return byte == char(UNWRITTEN); });
  }

 private:
  static int visit(dl_phdr_info* info, size_t, void* result) {
    const auto here = reinterpret_cast<uintptr_t>(&StaticShared::visit);
    const ElfW(Phdr)* tls = nullptr;
    bool ours = false;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      const ElfW(Phdr)& header = info->dlpi_phdr[i];
      const uintptr_t start = info->dlpi_addr + header.p_vaddr;
      if (header.p_type == PT_LOAD && here >= start && here < start + header.p_memsz) ours = true;
      if (header.p_type == PT_TLS) tls = &header;
    }
    if (!ours || !tls) return 0;
    auto* found = static_cast<StaticShared*>(result);
    found->data = static_cast<char*>(info->dlpi_tls_data);
    found->bytes = tls->p_memsz;
    return 1;
  }
};

struct Barrier {
  unsigned expected = 0, arrived = 0;
  int votes = 0;
  Site at{};
  std::vector<Fiber*> waiting;
  std::bitset<MAX_THREADS> by;
};

// A warp operation that waits for the rest of its lanes.
struct Collective {
  unsigned mask = 0, arrived = 0;
  const void* kind = nullptr;
  const char* what = nullptr;
  Site at{};
  void (*body)() = nullptr;
  void (*complete)(Collective&) = nullptr;
  Fiber* fibers[32] = {};
  const void* in[32] = {};
  void* out[32] = {};
};

struct Warp {
  unsigned exited = 0;  // lanes that have returned, or that a short block never had
  std::vector<Collective> collectives;
};

struct Cluster;

struct Block {
  Cluster* cluster = nullptr;
  uint3 index{};
  unsigned rank = 0;  // in the cluster
  unsigned threads = 0, live = 0;
  SharedMemory* shared = nullptr;
  Barrier barriers[16];
  std::vector<Warp> warps;
  std::vector<void (*)(Block&)> at_end;  // what is to be right when it has finished
  Attachments parts;
};

struct ClusterBarrier {
  unsigned arrived = 0;
  uint64_t phase = 0;
  std::vector<Fiber*> waiting;
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<Fiber> fibers;
  unsigned live = 0;
  ClusterBarrier barrier;
};

struct Grid {
  dim3 grid, block, cluster;
  StaticShared static_shared;
  std::unique_ptr<Cluster> running;
};

inline Grid grid;

inline bool in_shared(const void* pointer, size_t bytes = 1) {
  return self().block->shared->holds(pointer, bytes) || grid.static_shared.holds(pointer, bytes);
}

// Addresses in the shared window, as descriptors and `__cvta_generic_to_shared` have them: the
// dynamic part, then the static one.
inline uint32_t static_shared_base(const Block& block) {
  const size_t dynamic = (block.shared->bytes() + SHARED_ALIGNMENT - 1) / SHARED_ALIGNMENT;
  const size_t offset = reinterpret_cast<uintptr_t>(grid.static_shared.data) % SHARED_ALIGNMENT;
  return uint32_t(SHARED_BASE + dynamic * SHARED_ALIGNMENT + offset);
}

inline uint32_t shared_address(const void* pointer, Site at) {
  const Block& block = *self().block;
  const char* p = static_cast<const char*>(pointer);
  if (block.shared->holds(pointer, 0)) return uint32_t(SHARED_BASE + (p - block.shared->data()));
  if (grid.static_shared.holds(pointer, 0)) {
    return uint32_t(static_shared_base(block) + (p - grid.static_shared.data));
  }
  fail(at, "the pointer does not point to shared memory of this block");
}

inline char* shared_pointer(const Block& block, uint32_t address, size_t bytes) {
  char* dynamic = block.shared->data() + (int64_t(address) - SHARED_BASE);
  if (block.shared->holds(dynamic, bytes)) return dynamic;
  char* fixed = grid.static_shared.data + (int64_t(address) - static_shared_base(block));
  if (grid.static_shared.holds(fixed, bytes)) return fixed;
  fail(format("%zu bytes at shared address %#x are outside the block's shared memory", bytes,
              address));
}

}  // namespace simt
