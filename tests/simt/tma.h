// TMA: boxes of a tensor of up to three dimensions between global and shared memory.
//
// A load makes its destination undefined at its issue and fills it later; a store reads its source
// later, and fails where that has changed since its issue.
#pragma once
#include <map>

#include "mbarrier.h"
#include "tensor_map.h"

namespace simt {

// What the runner keeps in a fusedmlp::TensorMap.
struct Tensor {
  uint64_t magic;
  char* base;
  uint64_t size[3], stride[2];
  uint32_t box[3];
  bool swizzle;

  static constexpr uint64_t MAGIC = 0x7e4507a911dea5ed;
  size_t box_bytes() const { return size_t(box[0]) * box[1] * box[2] * 2; }
};
static_assert(sizeof(Tensor) <= sizeof(fusedmlp::TensorMap));

struct Coordinates {
  int64_t c[3];
};

inline Tensor tensor_of(const fusedmlp::TensorMap* map) {
  Tensor tensor;
  std::memcpy(&tensor, map->bytes, sizeof tensor);
  if (tensor.magic != Tensor::MAGIC) fail("the tensor map has not been encoded");
  if (tensor.swizzle && tensor.box[0] != 64) {
    fail("a swizzled box whose rows are not of 128 bytes: its layout is not documented");
  }
  return tensor;
}

// Bits 4 to 6 of an address are XORed with bits 7 to 9.
inline char* swizzled(char* pointer, bool swizzle) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  return swizzle ? reinterpret_cast<char*>(address ^ (address >> 3 & 0x70)) : pointer;
}

// Calls copy(global, shared, count) for each run of elements of the box: chunks of 8, cut where the
// tensor ends; `global` is null outside.
template <class Copy>
void walk_box(const Tensor& t, Coordinates at, char* shared, Copy copy) {
  for (uint32_t z = 0; z < t.box[2]; ++z) {
    for (uint32_t y = 0; y < t.box[1]; ++y) {
      const int64_t cy = at.c[1] + y, cz = at.c[2] + z;
      const bool row = cy >= 0 && cy < int64_t(t.size[1]) && cz >= 0 && cz < int64_t(t.size[2]);
      for (uint32_t x = 0; x < t.box[0]; x += 8) {
        char* to = swizzled(shared + ((size_t(z) * t.box[1] + y) * t.box[0] + x) * 2, t.swizzle);
        const int64_t cx = at.c[0] + x, size = int64_t(t.size[0]);
        const int64_t from = row ? std::min(std::max<int64_t>(cx, 0), cx + 8) : cx + 8;
        const int64_t end = row ? std::max(std::min(cx + 8, size), from) : cx + 8;
        const int64_t offset = from + cy * int64_t(t.stride[0]) + cz * int64_t(t.stride[1]);
        if (from > cx) copy(nullptr, to, size_t(from - cx));
        if (end > from) copy(t.base + 2 * offset, to + 2 * (from - cx), size_t(end - from));
        if (cx + 8 > end) copy(nullptr, to + 2 * (end - cx), size_t(cx + 8 - end));
      }
    }
  }
}

// What TMA knows a part of a block's shared memory to hold, to find writes of threads that no
// fence_async_shared has followed.
struct AsyncView {
  uint64_t fences = 0;
  struct Region {
    std::string content;
    uint64_t fences;
  };
  std::map<const char*, Region> regions;

  void remember(const char* data, size_t bytes) {
    regions[data] = {std::string(data, bytes), fences};
  }
  bool unfenced(const char* data, size_t bytes) const {
    const auto known = regions.find(data);
    if (known == regions.end()) return fences == 0;
    return known->second.fences == fences && known->second.content != std::string(data, bytes);
  }
};

inline void check_tma(const void* smem, size_t bytes, const char* what, Site at) {
  if (uintptr_t(smem) % 128) fail(at, format("%s: shared memory not aligned to 128 bytes", what));
  if (!in_shared(smem, bytes)) {
    fail(at, format("%s of %zu bytes is not all in shared memory of this block", what, bytes));
  }
}

struct Target {
  Block* block;
  char* smem;
  uint64_t* bar;
};

inline void load_box(void* smem, const fusedmlp::TensorMap* map, uint64_t* bar, Coordinates from,
                     uint16_t ctas, Site at) {
  enter(at);
  const Tensor tensor = tensor_of(map);
  check_tma(smem, tensor.box_bytes(), "tma_load", at);
  std::vector<Target> targets;
  for (uint32_t rank = 0; rank < 16; ++rank) {
    if (!(ctas >> rank & 1)) continue;
    Target target{nullptr, in_block(static_cast<char*>(smem), rank), in_block(bar, rank)};
    target.block = self().block->cluster->blocks[rank].get();
    fenced_mbarrier(*target.block, target.bar);
    std::memset(target.smem, UNWRITTEN, tensor.box_bytes());
    targets.push_back(target);
  }
  scheduler.post(nullptr, "tma_load", at, true, [=] {
    for (const Target& target : targets) {
      walk_box(tensor, from, target.smem, [](const char* global, char* shared, size_t count) {
        global ? std::memcpy(shared, global, 2 * count) : std::memset(shared, 0, 2 * count);
      });
      target.block->parts.get<AsyncView>().remember(target.smem, tensor.box_bytes());
      MBarrier& barrier = fenced_mbarrier(*target.block, target.bar);
      expect_bytes(barrier, -int64_t(tensor.box_bytes()));
      complete_phase(barrier);
    }
  });
  scheduler.perturb();
}

struct BoxStore {
  Ticket read, write;
};

struct BoxStores {
  std::vector<std::shared_ptr<BoxStore>> open;
  std::vector<std::vector<std::shared_ptr<BoxStore>>> groups;
};

inline void store_box(const fusedmlp::TensorMap* map, const void* source, Coordinates to, Site at) {
  enter(at);
  const Tensor tensor = tensor_of(map);
  const size_t bytes = tensor.box_bytes();
  char* smem = static_cast<char*>(const_cast<void*>(source));
  check_tma(smem, bytes, "tma_store", at);
  auto& view = self().block->parts.get<AsyncView>();
  if (view.unfenced(smem, bytes)) {
    fail(at, "tma_store of what threads have written with no fence_async_shared since");
  }
  view.remember(smem, bytes);
  auto store = std::make_shared<BoxStore>();
  const std::string issued(smem, bytes);
  store->read = scheduler.post(nullptr, "tma_store", at, true, [=] {
    if (std::memcmp(issued.data(), smem, bytes)) {
      fail("shared memory was overwritten before the store had read it");
    }
    store->write = scheduler.post(nullptr, "tma_store", at, false, [=] {
      // The copy has the source's swizzle only where its addresses agree in the lower ten bits.
      std::string space(bytes + 2048, 0);
      char* copy = space.data() + (1024 - uintptr_t(space.data()) % 1024) + uintptr_t(smem) % 1024;
      std::memcpy(copy, issued.data(), bytes);
      walk_box(tensor, to, copy, [](char* global, const char* shared, size_t count) {
        if (global) std::memcpy(global, shared, 2 * count);
      });
    });
  });
  self().parts.get<BoxStores>().open.push_back(store);
  scheduler.perturb();
}

inline void wait_stores(size_t groups, bool written, Site at) {
  auto& stores = self().parts.get<BoxStores>();
  for (size_t i = 0; i + groups < stores.groups.size(); ++i) {
    for (const auto& store : stores.groups[i]) {
      scheduler.await(store->read, "tma_store_wait_read", at);
      if (written) scheduler.await(store->write, "tma_store_wait", at);
    }
  }
  if (written && stores.groups.size() > groups) {
    stores.groups.erase(stores.groups.begin(), stores.groups.end() - groups);
  }
}

}  // namespace simt

namespace fusedmlp {

// The limits of cuTensorMapEncodeTiled, as cuda.h has them.
inline int encode_tensor_map(TensorMap* map, const void* base, const uint64_t size[3],
                              const uint64_t stride[2], const uint32_t box[3], bool swizzle, bool) {
  simt::Tensor tensor{};
  tensor.magic = simt::Tensor::MAGIC;
  tensor.base = static_cast<char*>(const_cast<void*>(base));
  tensor.swizzle = swizzle;
  bool valid = uintptr_t(base) % 16 == 0 && box[0] * 2 % 16 == 0 && (!swizzle || box[0] <= 64);
  for (int i = 0; i < 3; ++i) {
    valid = valid && size[i] >= 1 && size[i] <= uint64_t(1) << 32 && box[i] >= 1 && box[i] <= 256;
    tensor.size[i] = size[i];
    tensor.box[i] = box[i];
  }
  for (int i = 0; i < 2; ++i) {
    valid = valid && stride[i] * 2 % 16 == 0 && stride[i] * 2 < uint64_t(1) << 40;
    tensor.stride[i] = stride[i];
  }
  // A stride holds the whole dimension before it, and perhaps padding.
  valid = valid && stride[0] >= size[0] && stride[1] % stride[0] == 0;
  valid = valid && stride[1] / stride[0] >= size[1];
  if (valid) std::memcpy(map->bytes, &tensor, sizeof tensor);
  return valid ? 0 : 1;
}

inline void tma_load(void* smem, const TensorMap* map, uint64_t* bar, int c0, int c1, int c2,
                     simt::Site at = simt::Site::here()) {
  const auto own = uint16_t(1 << cluster_rank());
  simt::load_box(smem, map, bar, {{c0, c1, c2}}, own, at);
}
inline void tma_load(void* smem, const TensorMap* map, uint64_t* bar, int c0, int c1, int c2,
                     uint16_t cta_mask, simt::Site at = simt::Site::here()) {
  simt::load_box(smem, map, bar, {{c0, c1, c2}}, cta_mask, at);
}
inline void tma_store(const TensorMap* map, const void* smem, int c0, int c1, int c2,
                      simt::Site at = simt::Site::here()) {
  simt::store_box(map, smem, {{c0, c1, c2}}, at);
}
inline void tma_store_commit() {
  auto& stores = simt::self().parts.get<simt::BoxStores>();
  stores.groups.push_back(std::move(stores.open));
  stores.open.clear();
}
template <int N>
void tma_store_wait_read(simt::Site at = simt::Site::here()) {
  simt::wait_stores(N, false, at);
}
template <int N>
void tma_store_wait(simt::Site at = simt::Site::here()) {
  simt::wait_stores(N, true, at);
}
inline void prefetch(const TensorMap* map) { simt::tensor_of(map); }
inline void fence_async_shared() {
  ++simt::self().block->parts.get<simt::AsyncView>().fences;
  simt::scheduler.perturb();
}

}  // namespace fusedmlp
