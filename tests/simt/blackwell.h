// csrc/blackwell.cuh on the host runner: tensor memory and tcgen05.
//
// A product runs at any time after its issue, those of one thread in order; until then its columns
// read as NaN, as do the registers of a load until tmem_load_wait.
#pragma once
#include "hopper.h"

namespace simt {

constexpr int TENSOR_LANES = 128, TENSOR_COLUMNS = 512;

struct TensorMemory {  // of one block
  std::vector<float> values = std::vector<float>(TENSOR_LANES * TENSOR_COLUMNS);
  std::vector<int> in_flight = std::vector<int>(TENSOR_COLUMNS);  // products, by column
  std::map<uint32_t, int> allocated;                              // first column -> columns
  bool permit = true;

  float* at(int lane, int column) { return &values[size_t(lane) * TENSOR_COLUMNS + column]; }
  bool holds(uint32_t column, int columns) const {
    auto next = allocated.upper_bound(column);
    if (next == allocated.begin()) return false;
    --next;
    return column + columns <= next->first + next->second;
  }
};

inline TensorMemory& tensor_memory() { return self().block->parts.get<TensorMemory>(); }

struct TensorCall {
  uint32_t* out;
  uint32_t address;
  int columns;
};

inline void check_columns(int columns, const char* what) {
  if (columns < 32 || columns > TENSOR_COLUMNS || (columns & (columns - 1))) {
    fail(format("%s of %d columns: not a power of two from 32 to 512", what, columns));
  }
}

// A place for so many columns; in a random order of threads not the first one.
inline uint32_t allocate(TensorMemory& memory, int columns) {
  std::vector<uint32_t> places;
  for (int first = 0; first + columns <= TENSOR_COLUMNS; first += 32) {
    bool free = true;
    for (const auto& [other, count] : memory.allocated) {
      free &= first + columns <= int(other) || first >= int(other) + count;
    }
    if (free) places.push_back(uint32_t(first));
  }
  if (places.empty()) fail(format("tmem_alloc of %d columns: the block holds the rest", columns));
  const size_t place = scheduler.at_random() ? scheduler.below(unsigned(places.size())) : 0;
  memory.allocated[places[place]] = columns;
  for (int lane = 0; lane < TENSOR_LANES; ++lane) {
    std::fill_n(memory.at(lane, int(places[place])), columns, undefined<float>());
  }
  return places[place];
}

inline void check_freed(Block& block) {
  if (!block.parts.get<TensorMemory>().allocated.empty()) {
    throw Error("the block has finished without tmem_free");
  }
}

using TensorCalls = Lanes<TensorCall, int>;

inline void allocate_together(const TensorCalls& lanes) {
  TensorMemory& memory = tensor_memory();
  if (!memory.permit) fail("tmem_alloc after tmem_give_up_permit");
  const TensorCall& call = lanes.in(self().lane());
  if (!in_shared(call.out, 4)) fail("tmem_alloc does not write to shared memory of this block");
  lanes.each([&](unsigned lane) {
    if (lanes.in(lane).columns != call.columns || lanes.in(lane).out != call.out) {
      fail("the lanes of a warp disagree about tmem_alloc");
    }
  });
  *call.out = allocate(memory, call.columns);
  auto& checks = self().block->at_end;
  if (checks.empty()) checks.push_back(check_freed);
}

inline void free_together(const TensorCalls& lanes) {
  TensorMemory& memory = tensor_memory();
  const TensorCall& call = lanes.in(self().lane());
  const auto found = memory.allocated.find(call.address);
  if (found == memory.allocated.end() || found->second != call.columns) {
    fail(format("tmem_free of %d columns at %#x, which tmem_alloc has not given", call.columns,
                call.address));
  }
  memory.allocated.erase(found);
}

// The instruction descriptor of kind::f16 (CUTLASS, cute/arch/mma_sm100_desc.hpp, InstrDescriptor).
struct Instruction {
  int m, n;
  bool bf16, b_mn_major;
};

inline Instruction decode(uint32_t bits) {
  const Instruction instruction{int(bits >> 24 & 0x1f) * 16, int(bits >> 17 & 0x3f) * 8,
                                (bits >> 7 & 7) == 1, (bits >> 16 & 1) != 0};
  if ((bits >> 4 & 3) != 1) fail("an instruction descriptor without a float32 accumulator");
  if ((bits >> 7 & 7) > 1 || (bits >> 7 & 7) != (bits >> 10 & 7)) {
    fail("an instruction descriptor whose operands are not both bf16 or both fp16");
  }
  if (bits & 0xc080e04f) fail("an instruction descriptor that asks for more than a product");
  if (instruction.m != 128) fail(format("a product of %d rows, only 128 are known", instruction.m));
  if (instruction.n < 16 || instruction.n > 256 || instruction.n % 16) {
    fail(format("a product of 128 rows and %d columns", instruction.n));
  }
  return instruction;
}

inline void issue_tensor_product(uint32_t d, uint64_t a, uint64_t b, uint32_t bits, bool accumulate,
                                 Site at) {
  enter(at);
  const Instruction instruction = decode(bits);
  TensorMemory& memory = tensor_memory();
  if (d >> 16) fail("tcgen05_mma to lanes that are not the first");
  if (!memory.holds(d, instruction.n)) fail("tcgen05_mma to columns that are not allocated");
  if (self().behind_commit) fail("tcgen05_mma with no tcgen05_fence_after the barrier");
  const Product product{operand_sm100(a), operand_sm100(b), 128, instruction.n,
                        instruction.b_mn_major, accumulate,
                        instruction.bf16 ? float_table<__nv_bfloat16>() : float_table<__half>()};
  const auto count = [&memory, d, n = instruction.n](int by) {
    for (int i = 0; i < n; ++i) memory.in_flight[d + i] += by;
  };
  count(1);
  Block* block = self().block;
  scheduler.post(&self(), "tcgen05_mma", at, true, [=, &memory] {
    multiply(*block, product, memory.at(0, int(d)), TENSOR_COLUMNS);
    count(-1);
  });
  scheduler.perturb();
}

inline void commit_tensor_products(uint64_t* bar, uint16_t ctas, Site at) {
  enter(at);
  std::vector<std::pair<Block*, uint64_t*>> targets;
  for (uint32_t rank = 0; rank < 16; ++rank) {
    if (!(ctas >> rank & 1)) continue;
    uint64_t* there = in_block(bar, rank);
    Block* block = self().block->cluster->blocks[rank].get();
    fenced_mbarrier(*block, there).committed = true;
    targets.push_back({block, there});
  }
  scheduler.post(&self(), "tcgen05_commit", at, false, [=] {
    for (const auto& [block, there] : targets) {
      if (!block->live) fail("tcgen05_commit to a block that has finished");
      arrive_at(fenced_mbarrier(*block, there));
    }
  });
  scheduler.perturb();
}

struct TensorLoad {
  float* registers;
  int lane, column;
};
using TensorLoads = std::vector<TensorLoad>;  // of one thread

inline void issue_tensor_load(float* registers, uint32_t address, Site at) {
  Fiber& fiber = enter(at);
  const uint32_t lane = address >> 16, column = address & 0xffff;
  if (lane != 32 * (fiber.warp() % 4)) {
    fail(format("tmem_load of lane %u: warp %u reaches those from %u on", lane, fiber.warp(),
                32 * (fiber.warp() % 4)));
  }
  if (!tensor_memory().holds(column, 32)) fail("tmem_load of columns that are not allocated");
  if (fiber.behind_commit) fail("tmem_load with no tcgen05_fence_after the barrier");
  std::fill_n(registers, 32, undefined<float>());
  warp_operation<int>(~0u, "tmem_load", at, address, [](const Lanes<uint32_t, int>& lanes) {
    lanes.each([&](unsigned other) {
      if (lanes.in(other) != lanes.in(0)) fail("the lanes of a warp disagree about tmem_load");
    });
  });
  fiber.parts.get<TensorLoads>().push_back({registers, int(lane + fiber.lane()), int(column)});
}

inline void wait_tensor_loads() {
  TensorMemory& memory = tensor_memory();
  auto& loads = self().parts.get<TensorLoads>();
  for (const TensorLoad& load : loads) {
    for (int i = 0; i < 32; ++i) {
      const bool ready = !memory.in_flight[load.column + i];
      load.registers[i] = ready ? *memory.at(load.lane, load.column + i) : undefined<float>();
    }
  }
  loads.clear();
}

}  // namespace simt

namespace fusedmlp {

inline void tmem_alloc(uint32_t* smem_address_out, int columns,
                       simt::Site at = simt::Site::here()) {
  simt::enter(at);
  simt::check_columns(columns, "tmem_alloc");
  const simt::TensorCall call{smem_address_out, 0, columns};
  simt::warp_operation<int>(~0u, "tmem_alloc", at, call, simt::allocate_together);
}
inline void tmem_free(uint32_t address, int columns, simt::Site at = simt::Site::here()) {
  simt::enter(at);
  const simt::TensorCall call{nullptr, address, columns};
  simt::warp_operation<int>(~0u, "tmem_free", at, call, simt::free_together);
}
inline void tmem_give_up_permit() { simt::tensor_memory().permit = false; }

inline uint64_t matrix_descriptor_sm100(const void* smem, uint32_t leading_bytes,
                                        uint32_t stride_bytes,
                                        simt::Site at = simt::Site::here()) {
  const uint64_t address = (simt::shared_address(smem, at) & 0x3ffff) >> 4;
  return address | uint64_t(leading_bytes >> 4) << 16 | uint64_t(stride_bytes >> 4) << 32 |
         uint64_t(1) << 46 | uint64_t(2) << 61;
}
template <class T>
constexpr uint32_t instruction_descriptor(int m, int n, bool b_mn_major) {
  constexpr uint32_t type = std::is_same_v<T, __nv_bfloat16> ? 1 : 0;
  return 1u << 4 | type << 7 | type << 10 | uint32_t(b_mn_major) << 16 | uint32_t(n / 8) << 17 |
         uint32_t(m / 16) << 24;
}
inline void tcgen05_mma(uint32_t tmem_d, uint64_t a, uint64_t b, uint32_t instruction,
                        bool accumulate, simt::Site at = simt::Site::here()) {
  simt::issue_tensor_product(tmem_d, a, b, instruction, accumulate, at);
}
inline void tcgen05_commit(uint64_t* bar, simt::Site at = simt::Site::here()) {
  simt::commit_tensor_products(bar, uint16_t(1 << cluster_rank()), at);
}
inline void tcgen05_commit(uint64_t* bar, uint16_t cta_mask, simt::Site at = simt::Site::here()) {
  simt::commit_tensor_products(bar, cta_mask, at);
}
inline void tcgen05_fence_before() { simt::scheduler.perturb(); }
inline void tcgen05_fence_after() { simt::self().behind_commit = false; }

inline void tmem_load_x32(float (&d)[32], uint32_t tmem, simt::Site at = simt::Site::here()) {
  simt::issue_tensor_load(d, tmem, at);
}
inline void tmem_load_wait() { simt::wait_tensor_loads(); }
template <int N>
void tmem_load_wait(float (&)[N]) {
  simt::wait_tensor_loads();
}

}  // namespace fusedmlp
