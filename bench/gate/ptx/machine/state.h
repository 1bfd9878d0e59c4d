// A warp, a block, a cluster: all that a launch has at one moment.
#pragma once
#include <sys/mman.h>
#include "base.h"

namespace ptx {

// One tensor of the call, or a constant: addresses of the device, and where its bytes lie here.
struct Region {
  u64 begin, end;
  u8* host;
  u8* written;  // by byte: has anything written it? null: all of it was there before
  s32 name;
};

// Who last touched a granule of global memory in this launch: block + 1 (0: nobody, MANY: several),
// and the writing warp's moment.
constexpr u32 MANY = ~0u;
struct Touch {
  u32 writer, moment, reader;
  bool atomic;
};
// A region's touches. Their memory is the system's, zeros that cost nothing until they are written: two
// weights of one tensor map may lie gigabytes apart, and nobody touches what is between.
class Touches {
 public:
  explicit Touches(size_t count) : bytes(count * sizeof(Touch)) {
    if (!bytes) return;
    void* made = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (made == MAP_FAILED) fail("no memory to note who touches %zu granules", count);
    first = static_cast<Touch*>(made);
  }
  Touches(Touches&& other) : bytes(other.bytes), first(std::exchange(other.first, nullptr)) {}
  ~Touches() {
    if (first) munmap(first, bytes);
  }
  Touch& operator[](size_t granule) { return first[granule]; }

 private:
  size_t bytes;
  Touch* first = nullptr;
};

struct Copy {  // one lane's cp.async
  u64 source;
  u32 target, bytes, from;
};
struct Box {  // one TMA store
  u64 map;
  u32 shared, lane;
  s32 at[5];
  bool read = false;
};
struct Product {  // one warp's share of a wgmma
  const Ins* ins;
  u64 a, b;
  u32 registers[4][LANES];  // A, where it is not in shared memory
  bool accumulate, done;
};
struct Part {  // lanes that left a warp's path: where they go on, and where others join them
  int pc;
  u32 lanes;
  int join;
};

using Clock = std::vector<u32>;  // by agent: warps of the cluster, then the two that follow
inline void join(Clock& into, const Clock& from) {
  if (into.size() < from.size()) into.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}
// A moment: an agent and its clock, in 32 bits.
inline u32 moment(u32 agent, u32 clock) { return agent << 26 | clock; }
inline u32 agent_of(u32 m) { return m >> 26; }
inline u32 clock_of(u32 m) { return m & 0x3ffffff; }

struct Block;
struct Warp {
  Block* block;
  int id;     // in its block
  int agent;  // in its cluster
  int pc = 0, joins = -1;
  u32 active = ALL, alive = ALL, m = ALL;  // m: the lanes that carry out this instruction
  u8* registers;
  std::vector<Part> parts;
  enum { READY, BARRIER, CLUSTER, MBARRIER, DONE } state = READY;
  enum { AWAY, ARRIVED, PASSED } cluster = AWAY;  // at the cluster's barrier
  u32 waits_for = 0, parity = 0;
  int polled = -1;  // the try_wait that has said no last
  Clock clock;
  std::vector<Copy> copies;
  std::deque<std::vector<Copy>> copy_groups;
  std::vector<Box> boxes;
  std::deque<std::vector<Box>> box_groups;
  std::vector<Product> products;
  std::deque<std::vector<Product>> product_groups;
  std::vector<u8> busy;   // by register: asynchronous instructions that write it
  std::vector<u8> held;   // by register: asynchronous instructions that read it
  std::vector<u8> dirty;  // by register: written since the last wgmma.fence
  int in_flight = 0;      // instructions that busy stands for
  std::vector<s32> tensor_loads;  // registers that a tcgen05.ld still fills
  std::vector<std::vector<u8>> local;  // by lane
};

struct MBarrier {
  u32 count, pending;
  s64 bytes = 0;
  u32 phase = 0;
  Clock arriving, clock;  // of this phase's arrivals; of all completed phases
  u32 born = 0;           // the moment of its init
};
struct Barrier {
  std::vector<Warp*> warps;  // that wait
  std::vector<Warp*> arrived;
  Clock arriving;  // what all of them knew when they came
  u32 need = 0;
};
struct Load {  // one TMA load in flight
  u64 map;
  u32 shared, mbarrier, mask;
  s32 at[5];
  u32 issued;  // the moment of its issue
};
struct TensorProduct {  // one tcgen05.mma in flight, or a commit behind it
  u64 a, b;
  u32 d, instruction, mbarrier, mask;
  bool accumulate, commit;
  Clock clock;  // of a commit: what its warp knew
};

constexpr int TENSOR_LANES = 128, TENSOR_COLUMNS = 512;

// By granule of shared memory: who wrote it, who read it, what is still to come.
struct Shadow {
  u32 written = 0;       // the moment of the last write
  u64 alike = 0;         // warps that wrote the same value, in no order
  u8 unfenced = 0;       // warp + 1 of a write that no proxy fence has followed
  u8 defined = 0;        // was it ever written?
  u16 coming = 0;        // asynchronous copies that will write it
  u16 being_read = 0;    // asynchronous products that will read it
};

struct Cluster;
struct Block {
  Cluster* cluster;
  u32 rank = 0, index = 0;
  u32 ctaid[3];
  std::vector<u8> shared;
  std::vector<Warp> warps;
  std::map<u32, MBarrier> mbarriers;
  std::map<u32, Barrier> barriers;
  std::vector<Load> loads;
  std::deque<TensorProduct> products;
  std::vector<u32> tensor;  // tensor memory: lanes x columns
  std::vector<u8> tensor_busy, tensor_defined;
  u32 tensor_used = 0;
  std::vector<Shadow> shadow;
  std::vector<u32> read;  // by granule and agent: its clock at its last read
};

struct Options {
  s32 when;      // asynchronous operations run 0: as late as possible, 1: at once, 2: by seed
  u32 seed;
  s32 races;     // look for them
  s32 strict;    // to the letter of the ISA, where Triton leaves the rest to ptxas: see run.py
  s32 sums;
  float noise;
  s64 budget;    // instructions of a block
};

struct Cluster {
  std::vector<Block> blocks;
  int warps = 0;  // of all blocks
  u32 nctaid[3];
  u32 shape[3] = {1, 1, 1};
  const u8* params;
  u64 param_bytes;
  std::vector<Region>* regions;
  std::vector<Touches>* touches;        // by region
  u32 granule = 1, global_granule = 1;  // bytes: of the shortest store
  std::mt19937 random;
  Options options;
  u32 copied = 1, multiplied = 1;  // the clocks of the agents below
  Clock arriving, passed;          // of warps at the cluster's barrier: this time, the time before
  u64 count = 0;
  u64* executed = nullptr;

  u32 copier() const { return u32(warps); }  // TMA loads write as this agent
  u32 tensor_core() const { return u32(warps) + 1; }  // tcgen05 products read as this one
  u32 agents() const { return u32(warps) + 2; }
};

template <class T>
inline T* lanes_of(Warp& w, s32 offset) {
  return reinterpret_cast<T*>(w.registers + offset);
}
inline bool here(const Warp& w, int lane) { return w.m >> lane & 1; }
inline void set_mask(Warp& w, s32 offset, u32 value) {
  u32& p = *lanes_of<u32>(w, offset);
  p = (p & ~w.m) | (value & w.m);
}
inline bool at_once(Block& b) {
  Cluster& c = *b.cluster;
  return c.options.when == 1 || (c.options.when == 2 && (c.random() & 1));
}

}  // namespace ptx
