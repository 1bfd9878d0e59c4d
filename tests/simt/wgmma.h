// wgmma: products of a warp group of 128 threads, asynchronous.
//
// From its issue until wgmma_wait has covered it, a product's accumulator holds NaN; the operands
// are read at any time after all 128 threads have issued it.
#pragma once
#include "matrices.h"

namespace simt {

struct GroupProduct {
  uint64_t a, b;
  Product product;
  int accumulator;
  unsigned issued = 0;
  bool done = false;
  std::vector<Fiber*> waiting;
  Ticket ticket;
};

// A warp group's products in the order of their issue, and its accumulators as matrices.
struct WarpGroup {
  std::vector<std::shared_ptr<GroupProduct>> products;
  std::vector<std::vector<float>> accumulators;
};
using WarpGroups = std::map<unsigned, WarpGroup>;  // of one block

struct Accumulator {
  float* registers;
  int count;  // of registers
  unsigned in_flight = 0;
};

// One thread's side.
struct GroupThread {
  std::vector<Accumulator> accumulators;  // by first use, which every thread makes in one order
  size_t issued = 0;
  std::vector<size_t> open;
  std::deque<std::vector<size_t>> groups;
  bool ever_fenced = false, fenced = false;
};

inline WarpGroup& warp_group() {
  return self().block->parts.get<WarpGroups>()[self().rank / 128];
}

// Calls f(i, place in the matrix) for each register of thread t.
template <class Each>
void each_register(unsigned t, int count, Each f) {
  for (int i = 0; i < count; ++i) {
    const unsigned row = 16 * (t / 32) + t % 32 / 4 + 8 * (i / 2 % 2);
    f(i, size_t(row) * (2 * count) + 8 * (i / 4) + 2 * (t % 4) + i % 2);
  }
}

inline int accumulator_of(GroupThread& thread, float* registers, int count) {
  auto& all = thread.accumulators;
  for (size_t i = 0; i < all.size(); ++i) {
    if (all[i].registers != registers) continue;
    if (all[i].count != count && all[i].in_flight) fail("an accumulator takes another shape");
    all[i].count = count;
    return int(i);
  }
  all.push_back({registers, count});
  return int(all.size()) - 1;
}

// The thread's registers go into the matrix, and hold NaN from now on.
inline void hand_in(GroupThread& thread, int index, bool accumulate) {
  Accumulator& mine = thread.accumulators[index];
  WarpGroup& group = warp_group();
  if (group.accumulators.size() <= size_t(index)) group.accumulators.resize(index + 1);
  std::vector<float>& matrix = group.accumulators[index];
  const size_t size = 64 * 2 * size_t(mine.count);
  if (!thread.ever_fenced) fail("wgmma before the first wgmma_fence");
  if (mine.in_flight++) return;
  if (matrix.size() != size) matrix.assign(size, undefined<float>());
  const unsigned t = self().rank % 128;
  bool changed = false;
  each_register(t, mine.count, [&](int i, size_t place) {
    changed |= std::memcmp(&matrix[place], &mine.registers[i], sizeof(float)) != 0;
    matrix[place] = mine.registers[i];
  });
  if (accumulate && changed && !thread.fenced) {
    fail("wgmma adds to registers that were written with no wgmma_fence since");
  }
  std::memset(mine.registers, UNWRITTEN, mine.count * sizeof(float));
}

// And back, once no product of theirs is in flight.
inline void hand_out(GroupThread& thread, int index) {
  Accumulator& mine = thread.accumulators[index];
  if (--mine.in_flight) return;
  const std::vector<float>& matrix = warp_group().accumulators[index];
  each_register(self().rank % 128, mine.count, [&](int i, size_t place) {
    if (__float_as_uint(mine.registers[i]) != ~0u) {
      fail("accumulators of a wgmma in flight were written");
    }
    mine.registers[i] = matrix[place];
  });
}

inline std::string product_state(const void* object) {
  return format("issued by %u of 128 threads", static_cast<const GroupProduct*>(object)->issued);
}

inline void perform(Block& block, WarpGroup& group, GroupProduct& p) {
  multiply(block, p.product, group.accumulators[p.accumulator].data(), p.product.columns);
  p.done = true;
  scheduler.wake(p.waiting);
}

inline void issue_product(uint64_t a, uint64_t b, const Product& product, float* registers,
                          Site at) {
  enter(at);
  auto& thread = self().parts.get<GroupThread>();
  WarpGroup& group = warp_group();
  const int index = accumulator_of(thread, registers, product.columns / 2);
  hand_in(thread, index, product.accumulate);
  const size_t order = thread.issued++;
  thread.open.push_back(order);
  if (order == group.products.size()) {
    group.products.push_back(std::make_shared<GroupProduct>(GroupProduct{a, b, product, index}));
  }
  const std::shared_ptr<GroupProduct> mine = group.products[order];
  if (mine->a != a || mine->b != b || mine->product.columns != product.columns ||
      mine->product.accumulate != product.accumulate || mine->accumulator != index) {
    fail(at, "the threads of a warp group issue different products");
  }
  if (++mine->issued == 128) {
    Block* block = self().block;
    WarpGroup* of = &group;
    mine->ticket = scheduler.post(of, "wgmma", at, true, [=] { perform(*block, *of, *mine); });
  }
  scheduler.perturb();
}

inline void wait_products(size_t groups, Site at) {
  enter(at);
  auto& thread = self().parts.get<GroupThread>();
  while (thread.groups.size() > groups) {
    const std::vector<size_t> oldest = std::move(thread.groups.front());
    thread.groups.pop_front();
    for (const size_t order : oldest) {
      const std::shared_ptr<GroupProduct> product = warp_group().products[order];
      while (!product->done) {
        if (product->ticket) product->ticket->must_be_awaited = false;
        product->waiting.push_back(&self());
        scheduler.block({"wgmma_wait", at, product_state, product.get()});
      }
      hand_out(thread, product->accumulator);
      thread.fenced = false;
    }
  }
}

}  // namespace simt

namespace fusedmlp {

inline uint64_t matrix_descriptor(const void* smem, uint32_t leading_bytes, uint32_t stride_bytes,
                                  simt::Site at = simt::Site::here()) {
  const uint64_t address = (simt::shared_address(smem, at) & 0x3ffff) >> 4;
  return address | uint64_t(leading_bytes >> 4) << 16 | uint64_t(stride_bytes >> 4) << 32 |
         uint64_t(1) << 62;
}

inline void wgmma_fence() {
  auto& thread = simt::self().parts.get<simt::GroupThread>();
  thread.ever_fenced = thread.fenced = true;
}
inline void wgmma_commit() {
  auto& thread = simt::self().parts.get<simt::GroupThread>();
  thread.groups.push_back(std::move(thread.open));
  thread.open.clear();
}
template <int N>
void wgmma_wait(simt::Site at = simt::Site::here()) {
  simt::wait_products(N, at);
}
// Keeps nvcc from reading accumulators early; wgmma_wait itself writes them here.
template <int N>
void wgmma_result(float (&)[N]) {}

template <class T, int N, bool B_MN_MAJOR>
void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate,
           simt::Site at = simt::Site::here()) {
  static_assert(N % 8 == 0 && N <= 256);
  const simt::Product product{simt::operand_sm90(a), simt::operand_sm90(b), 64, N, B_MN_MAJOR,
                              accumulate, simt::float_table<T>()};
  simt::issue_product(a, b, product, d, at);
}

}  // namespace fusedmlp
