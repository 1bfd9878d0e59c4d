// The loop over instructions, the scheduler of warps, and what Python calls.
#include "flow.h"
#include "lanes.h"
#include "tensor.h"
#include "transfers.h"

namespace ptx {
namespace {

const Table& table() {
  static const Table all = [] {
    Table t;
    add_lanes(t);
    add_transfers(t);
    add_barriers(t);
    add_copies(t);
    add_products(t);
    add_tensor(t);
    add_flow(t);
    return t;
  }();
  return all;
}

// What the registers of the special names hold, in the order of lower.py's SPECIAL.
enum Special { TID_X, TID_Y, TID_Z, NTID_X, NTID_Y, NTID_Z, CTAID_X, CTAID_Y, CTAID_Z, NCTAID_X, NCTAID_Y,
               NCTAID_Z, LANEID, WARPID, CTARANK, CLUSTERID_X, SPECIALS };

struct Program {
  std::vector<Ins> code;
  std::vector<s32> ops;
  std::vector<s64> imms;
  std::vector<u8> constants;  // the start of every register file
  u32 registers = 0;          // bytes of a register file
  u32 local = 0;              // bytes of a lane's local memory
  bool tensor = false;
  s32 special[SPECIALS];
};

void check_in_flight(Warp& w, const Ins& i) {
  for (int k = 0; k < i.nop; ++k)
    if (i.op[k] >= 0 && w.busy[register_of(i.op[k])])
      fail("operand %d is a register that an instruction in flight still writes", k);
  for (int k = 0, n = int(i.flags >> MARKS); k < n; ++k)
    if (i.op[k] >= 0 && w.held[register_of(i.op[k])])
      fail("operand %d is a register that a wgmma in flight still reads", k);
}

Step run(Warp& w, const std::vector<Ins>& code) {
  Cluster& c = *w.block->cluster;
  u64 count = 0;
  const auto spend = [&] {
    c.count += count;
    count = 0;
    if (s64(c.count) > c.options.budget) fail("more instructions than allowed: an endless loop?");
  };
  for (;;) {
    if (w.pc == w.joins || !w.active) next_part(w);
    const Ins& i = code[size_t(w.pc)];
    w.m = w.active;
    if (i.guard >= 0) {
      const u32 p = *lanes_of<u32>(w, i.guard);
      w.m &= i.negated ? ~p : p;
      if (!w.m) {
        ++w.pc;
        continue;
      }
    }
    ++c.executed[w.pc];
    if (++count == 1 << 16) spend();
    if (i.flags & CONVERGENT && w.m != w.alive) fail("only lanes %08x of %08x are here", w.m, w.alive);
    if (w.in_flight && !(i.flags & WAITS)) check_in_flight(w, i);
    const Step step = i.fn(w, i);
    if (!(i.flags & COPIES) || c.options.strict)
      for (int k = 0, n = int(i.flags >> MARKS); k < n; ++k)
        if (i.op[k] >= 0) w.dirty[register_of(i.op[k])] = 1;
    if (step == NEXT) {
      ++w.pc;
    } else if (step != JUMP) {
      spend();
      return step;
    }
  }
}

void finish(Warp& w) {
  w.state = Warp::DONE;
  if (w.in_flight) fail("a warp exits with a wgmma or a tcgen05.ld in flight");
  bool copies = !w.copies.empty();
  for (const auto& group : w.copy_groups) copies |= !group.empty();
  if (copies) fail("a warp exits with a cp.async that it does not wait for");
  for (const auto& group : w.box_groups)
    if (!group.empty()) fail("a warp exits while a TMA store may still read its shared memory");
  if (!w.boxes.empty()) fail("a warp exits with a TMA store that is in no group");
  for (auto& [id, barrier] : w.block->barriers)
    if (!barrier.need) open_if_full(*w.block, barrier);
  open_cluster(*w.block->cluster);
}

// current becomes the first warp that waits.
void deadlock(Cluster& c, const std::vector<Ins>& code, Warp*& current) {
  std::string all = "deadlock:";
  current = nullptr;
  for (Block& b : c.blocks)
    for (Warp& w : b.warps) {
      char text[160];
      if (w.state == Warp::BARRIER || w.state == Warp::CLUSTER) --w.pc;  // it stood behind the barrier
      if (w.state != Warp::DONE && !current) current = &w;
      const int line = code[std::min(size_t(std::max(w.pc, 0)), code.size() - 1)].line;
      if (w.state == Warp::BARRIER)
        snprintf(text, sizeof text, " warp %d at barrier %u (line %d);", w.agent, w.waits_for, line);
      else if (w.state == Warp::CLUSTER)
        snprintf(text, sizeof text, " warp %d at the cluster's barrier (line %d);", w.agent, line);
      else if (w.state == Warp::MBARRIER) {
        const MBarrier& m = mbarrier(b, w.waits_for);
        snprintf(text, sizeof text,
                 " warp %d at mbarrier %d for parity %u, %u arrivals and %lld bytes missing (line %d);",
                 w.agent, int(w.waits_for - SHARED_BASE), w.parity, m.pending, (long long)m.bytes, line);
      } else
        snprintf(text, sizeof text, " warp %d done;", w.agent);
      all += text;
    }
  throw Fault{all};
}

// Nobody can go on: something asynchronous comes. Only what is waited for, so that a copy that nobody
// waits for does not.
void advance(Cluster& c, const std::vector<Ins>& code, Warp*& current) {
  struct Choice {
    Block* block;
    size_t load;
  };
  std::vector<Choice> wanted, others;
  Block* multiplies = nullptr;
  for (Block& b : c.blocks) {
    if (!b.products.empty()) multiplies = &b;
    for (size_t k = 0; k < b.loads.size(); ++k) {
      bool waited = false;
      for (Block& to : c.blocks)
        if (b.loads[k].mask ? b.loads[k].mask >> to.rank & 1 : &to == &b)
          for (const Warp& w : to.warps)
            waited |= w.state == Warp::MBARRIER && w.waits_for == b.loads[k].mbarrier;
      (waited ? wanted : others).push_back({&b, k});
    }
  }
  const bool seeded = c.options.when == 2;
  if (multiplies && (wanted.empty() || (seeded && (c.random() & 1)))) {
    perform(*multiplies, multiplies->products.front());
    multiplies->products.pop_front();
    return;
  }
  if (wanted.empty()) wanted = others;
  if (wanted.empty()) deadlock(c, code, current);
  const Choice choice = wanted[seeded ? c.random() % wanted.size() : 0];
  const Load load = choice.block->loads[choice.load];
  choice.block->loads.erase(choice.block->loads.begin() + s64(choice.load));
  perform(*choice.block, load);
}

void run_cluster(Cluster& c, const std::vector<Ins>& code, Warp*& current) {
  std::vector<Warp*> order;
  for (Block& b : c.blocks)
    for (Warp& w : b.warps) order.push_back(&w);
  if (c.options.when == 1) std::reverse(order.begin(), order.end());
  for (;;) {
    bool progress = false, left = false;
    if (c.options.when == 2) std::shuffle(order.begin(), order.end(), c.random);
    for (Warp* w : order) {
      if (w->state == Warp::DONE) continue;
      left = true;
      if (w->state == Warp::BARRIER || w->state == Warp::CLUSTER) continue;
      current = w;
      if (w->state == Warp::MBARRIER) {
        if ((mbarrier(*w->block, w->waits_for).phase & 1) == w->parity) continue;
        w->state = Warp::READY;
      }
      progress = true;
      if (run(*w, code) == EXIT) finish(*w);
      auto& loads = w->block->loads;
      if (c.options.when == 2 && !loads.empty() && (c.random() & 1)) {
        const Load load = loads.front();
        loads.erase(loads.begin());
        perform(*w->block, load);
      }
    }
    if (!left) break;
    if (!progress) advance(c, code, current);
  }
  for (Block& b : c.blocks) {
    if (!b.loads.empty() || !b.products.empty()) fail("a block ends with a TMA load or a product in flight");
    if (b.tensor_used) fail("a block ends without tcgen05.dealloc");
    for (auto& [id, barrier] : b.barriers)
      if (!barrier.arrived.empty()) fail("a block ends with warps that arrived at barrier %u for nobody", id);
  }
}

struct Call {
  u32 grid[3], cluster[3];
  s32 warps, shared;
  u32 granule, global_granule;
  Options options;
};

void start(Cluster& c, const Program& p, const Call& call, u32 first[3], std::vector<u8>& files) {
  const u32 blocks = call.cluster[0] * call.cluster[1] * call.cluster[2];
  c.warps = int(blocks) * call.warps;
  if (c.agents() > 64) fail("%d warps in a cluster: the machine knows 62", c.warps);
  const size_t file = (p.registers + 63) / 64 * 64;
  files.resize(file * size_t(c.warps) + 64);
  u8* base = files.data() + (64 - reinterpret_cast<uintptr_t>(files.data()) % 64) % 64;
  c.blocks.clear();
  c.blocks.resize(blocks);
  c.arriving.clear();
  c.copied = c.multiplied = 1;
  for (u32 rank = 0; rank < blocks; ++rank) {
    Block& b = c.blocks[rank];
    b.cluster = &c;
    b.rank = rank;
    const u32 in[3] = {rank % call.cluster[0], rank / call.cluster[0] % call.cluster[1],
                       rank / (call.cluster[0] * call.cluster[1])};
    for (int d = 0; d < 3; ++d) b.ctaid[d] = first[d] + in[d];
    b.index = b.ctaid[0] + call.grid[0] * (b.ctaid[1] + call.grid[1] * b.ctaid[2]);
    b.shared.assign(size_t(call.shared), POISON);
    if (p.tensor) {
      b.tensor.assign(size_t(TENSOR_LANES) * TENSOR_COLUMNS, ~0u);
      b.tensor_busy.assign(2 * TENSOR_COLUMNS, 0);
    }
    if (c.options.races) {
      const size_t granules = size_t(call.shared) / c.granule + 8;
      b.shadow.assign(granules, {});
      b.read.assign(granules * c.agents(), 0);
    }
    b.warps.resize(size_t(call.warps));
    for (int k = 0; k < call.warps; ++k) {
      Warp& w = b.warps[size_t(k)];
      w.block = &b;
      w.id = k;
      w.agent = int(rank) * call.warps + k;
      w.registers = base + file * size_t(w.agent);
      w.clock.assign(c.agents(), 0);
      w.clock[size_t(w.agent)] = 1;
      w.busy.assign(p.registers / 64 + 1, 0);
      w.held.assign(p.registers / 64 + 1, 0);
      w.dirty.assign(p.registers / 64 + 1, 1);
      if (p.local) w.local.assign(LANES, std::vector<u8>(p.local, POISON));
      std::memcpy(w.registers, p.constants.data(), p.constants.size());
      std::memset(w.registers + p.constants.size(), POISON, p.registers - p.constants.size());
      u32 values[SPECIALS] = {};
      values[TID_X] = u32(k) * LANES;
      values[NTID_X] = u32(call.warps) * LANES;
      values[NTID_Y] = values[NTID_Z] = 1;
      for (int d = 0; d < 3; ++d) values[CTAID_X + d] = b.ctaid[d], values[NCTAID_X + d] = call.grid[d];
      values[WARPID] = u32(k);
      values[CTARANK] = rank;
      values[CLUSTERID_X] = b.ctaid[0] / call.cluster[0];
      for (int s = 0; s < SPECIALS; ++s) {
        if (p.special[s] < 0) continue;
        for (int l = 0; l < LANES; ++l)
          lanes_of<u32>(w, p.special[s])[l] = values[s] + (s == TID_X || s == LANEID ? u32(l) : 0);
      }
    }
  }
}

}  // namespace
}  // namespace ptx

using namespace ptx;

extern "C" {

// The widths of a name's operands, "" where it has no such list; null where there is no such name.
const char* ptx_operands(const char* name) {
  const auto found = table().find(name);
  return found == table().end() ? nullptr : found->second.operands.c_str();
}
// Every name, one in a line.
const char* ptx_names() {
  static const std::string all = [] {
    std::string s;
    for (const auto& [name, entry] : table()) s += name + "\n";
    return s;
  }();
  return all.c_str();
}

// One row of 8 for each instruction: first operand, operands, first constant, guard, negated, target,
// line, flags.
Program* ptx_load(int n, const char** names, const s32* rows, const s32* ops, int nops, const s64* imms,
                  int nimms, const u8* constants, int constant_bytes, int register_bytes, int local,
                  const s32* special) {
  auto* p = new Program;
  p->ops.assign(ops, ops + nops);
  p->imms.assign(imms, imms + nimms);
  p->constants.assign(constants, constants + constant_bytes);
  p->registers = u32(register_bytes);
  p->local = u32(local);
  std::memcpy(p->special, special, sizeof p->special);
  for (int k = 0; k < n; ++k) {
    const s32* r = rows + 8 * k;
    p->tensor |= !std::strcmp(names[k], "tcgen05.alloc");
    p->code.push_back({table().at(names[k]).fn, p->ops.data() + r[0], p->imms.data() + r[2], r[1], r[3], r[5],
                       r[6], u32(r[7]), r[4] != 0});
  }
  return p;
}
void ptx_free(Program* p) { delete p; }

struct GivenRegion {
  u64 begin, end, host, written;
  s64 name;
};
struct Result {
  char message[2048];
  s32 line, warp;
  u32 ctaid[3];
  u64 count;
};

// executed: by row, how often warps carried it out; added to.
int ptx_run(const Program* p, const Call* call, const u8* params, int param_bytes, const GivenRegion* given,
            int regions, u64* executed, Result* result) {
  std::vector<Region> all;
  std::vector<Touches> touches;
  for (int k = 0; k < regions; ++k) {
    const GivenRegion& g = given[k];
    all.push_back({g.begin, g.end, reinterpret_cast<u8*>(g.host), reinterpret_cast<u8*>(g.written),
                   s32(g.name)});
  }
  Cluster c;
  c.params = params;
  c.param_bytes = u64(param_bytes);
  c.executed = executed;
  c.regions = &all;
  c.touches = &touches;
  c.granule = call->granule;
  c.global_granule = call->global_granule;
  c.options = call->options;
  leeway = {call->options.sums, call->options.noise};
  std::memcpy(c.nctaid, call->grid, sizeof c.nctaid);
  std::vector<u8> files;
  Warp* current = nullptr;
  result->count = 0;
  u32 first[3] = {0, 0, 0};
  try {
    for (const Region& r : all)
      touches.emplace_back(call->options.races ? size_t(r.end - r.begin) / call->global_granule + 2 : 0);
    u32 n[3];
    for (int d = 0; d < 3; ++d) {
      if (call->grid[d] % call->cluster[d]) fail("the grid is no multiple of the cluster in dimension %d", d);
      n[d] = call->grid[d] / call->cluster[d];
    }
    // Clusters are in no order either: backwards, or by seed.
    std::vector<u32> order(size_t(n[0]) * n[1] * n[2]);
    for (u32 k = 0; k < order.size(); ++k) order[k] = k;
    if (c.options.when == 1) std::reverse(order.begin(), order.end());
    std::mt19937 shuffler(c.options.seed);
    if (c.options.when == 2) std::shuffle(order.begin(), order.end(), shuffler);
    for (const u32 k : order) {
      const u32 at[3] = {k % n[0], k / n[0] % n[1], k / (n[0] * n[1])};
      for (int d = 0; d < 3; ++d) first[d] = at[d] * call->cluster[d];
      c.random.seed(c.options.seed + k);
      c.count = 0;
      current = nullptr;
      start(c, *p, *call, first, files);
      run_cluster(c, p->code, current);
      result->count += c.count;
    }
  } catch (const Fault& fault) {
    snprintf(result->message, sizeof result->message, "%s", fault.what.c_str());
    result->warp = current ? current->id : -1;
    std::memcpy(result->ctaid, current ? current->block->ctaid : first, sizeof first);
    const size_t pc = current ? std::min(size_t(std::max(current->pc, 0)), p->code.size() - 1) : 0;
    result->line = p->code[pc].line;
    result->count += c.count;
    return 1;
  }
  return 0;
}
}
