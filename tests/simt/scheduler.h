// Who runs next: the fibers of the blocks that are alive, and the asynchronous operations that they
// have issued (copies, tensor-core products).
//
// A fiber runs until it waits, so threads meet only where the kernel synchronises them. The seed
// picks one of the orders that the hardware might have taken:
//   0     threads in order, asynchronous operations as late as possible (when no thread can run)
//   1     threads in reverse, asynchronous operations at once
//   2     a warp goes on until all of its threads wait for others, so that warps drift as far apart
//         as the barriers between them allow; asynchronous operations as late as possible, and those
//         that a thread waits for before all others
//   >= 3  both at random; seeds differ in how soon operations run
#pragma once
#include <time.h>

#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "error.h"
#include "fiber.h"

namespace simt {

struct Fiber;
struct Block;

// State that a part of the runner keeps with a thread, block or cluster; made when first asked for.
class Attachments {
 public:
  template <class State>
  State& get() {
    static const char key = 0;
    for (auto& [owner, state] : states_) {
      if (owner == &key) return *static_cast<State*>(state.get());
    }
    states_.emplace_back(&key, std::make_shared<State>());
    return *static_cast<State*>(states_.back().second.get());
  }

 private:
  std::vector<std::pair<const void*, std::shared_ptr<void>>> states_;
};

// What a thread waits for, as the report of a deadlock tells it.
struct Wait {
  const char* what = nullptr;
  Site at{};
  std::string (*detail)(const void* object) = nullptr;
  const void* object = nullptr;
};

struct Fiber {
  Context context;
  Block* block = nullptr;
  uint3 thread{};
  unsigned rank = 0;  // in the block
  bool done = false;
  Wait wait;
  Site at{};       // the latest primitive it called
  bool behind_commit = false;  // it has waited for tcgen05 and not fenced since
  int result = 0;  // what a barrier with a vote gives back
  Attachments parts;

  unsigned lane() const { return rank % 32; }
  unsigned warp() const { return rank / 32; }
};

struct Operation {
  std::function<void()> action;
  const void* channel = nullptr;  // operations of one channel run in the order of their issue
  const char* what = nullptr;
  Site at{};
  bool must_be_awaited = false;
  bool done = false;
  std::vector<Fiber*> waiting;
};
using Ticket = std::shared_ptr<Operation>;

void thread_exited(Fiber&);                  // launch.h: the barriers stop counting it
std::string identity(const Fiber&);          // launch.h
[[noreturn]] void deadlock();                // launch.h

class Scheduler {
 public:
  uint64_t seed = 0;
  double seconds = 300;  // a launch that takes longer is stuck
  Fiber* current = nullptr;
  const Operation* performed = nullptr;  // the operation at work
  std::function<void()> body;
  Stacks stacks;

  void begin(uint64_t stream) {
    ready_.clear();
    pending_.clear();
    failure_ = nullptr;
    performed = nullptr;
    current = nullptr;
    preferred_ = nullptr;
    live_ = 0;
    idle_dispatches_ = 0;
    haste_ = 4u << 2 * (seed % 4);  // one switch in so many is an operation's turn
    random_ = seed * 0x9e3779b97f4a7c15 + stream;
  }

  bool warp_by_warp() const { return seed == 2; }
  bool at_random() const { return seed >= 3; }
  unsigned below(unsigned count) {  // splitmix64
    uint64_t z = random_ += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return unsigned((z >> 33) % count);
  }

  void add(Fiber& fiber, size_t stack) {
    fiber.context.start(stacks.top(stack), &Scheduler::fiber_main);
    ready_.push_back(&fiber);
    ++live_;
  }

  // The running fiber stops until another one calls wake() with it.
  void block(const Wait& wait) {
    current->wait = wait;
    leave();
  }

  // The running fiber lets others run. Where threads poll memory, this is what makes progress.
  void yield() {
    preferred_ = nullptr;
    ready_.push_back(current);
    leave();
  }

  // A place where, in a random order, another thread may run first.
  void perturb() {
    if (at_random() && current && below(4) == 0) yield();
  }

  // The running fiber has been woken with others and waits for its turn among them.
  void take_turn() { leave(); }

  void wake(Fiber* fiber) {
    fiber->wait = {};
    ready_.push_back(fiber);
    idle_dispatches_ = 0;
  }

  void wake(std::vector<Fiber*>& fibers) {
    if (seed == 1) {
      for (size_t i = fibers.size(); i-- > 0;) wake(fibers[i]);
    } else {
      for (Fiber* fiber : fibers) wake(fiber);
    }
    fibers.clear();
  }

  Ticket post(const void* channel, const char* what, Site at, bool must_be_awaited,
              std::function<void()> action) {
    auto ticket = std::make_shared<Operation>();
    ticket->action = std::move(action);
    ticket->channel = channel;
    ticket->what = what;
    ticket->at = at;
    ticket->must_be_awaited = must_be_awaited;
    pending_.push_back(ticket);
    if (seed == 1) perform(pending_.size() - 1);
    return ticket;
  }

  void await(const Ticket& ticket, const char* what, Site at) {
    ticket->must_be_awaited = false;
    if (ticket->done) return;
    ticket->waiting.push_back(current);
    block({what, at});
  }

  // Runs every fiber to its end, then what operations are left.
  void run() {
    deadline_ = now() + seconds;
    while (live_) {
      current = next();
      if (current) {
        main_.switch_to(current->context);
        current = nullptr;
        if (failure_) std::rethrow_exception(failure_);
      } else if (now() > deadline_) {
        throw Error("the launch takes too long: threads poll memory that nobody writes?");
      } else if (!pending_.empty()) {
        perform(eligible());
      } else {
        deadlock();
      }
    }
    for (const Ticket& ticket : pending_) {
      if (ticket->must_be_awaited) {
        throw Error(format("%s at %s was still in flight when its block had finished",
                           ticket->what, name(ticket->at).c_str()));
      }
    }
    while (!pending_.empty()) perform(eligible());
  }

  static double now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + 1e-9 * time.tv_nsec;
  }

 private:
  static void fiber_main();

  void leave() {
    Fiber* from = current;
    Fiber* to = next();
    if (to == from) return;
    current = to;
    from->context.switch_to(to ? to->context : main_);
  }

  // The next fiber; nullptr where it is an operation's turn.
  Fiber* next() {
    // Fibers that only yield may be polling for what an operation will write.
    const bool polling = ++idle_dispatches_ > 64 * (live_ + 1);
    if (!pending_.empty() && (polling || (at_random() && below(haste_) == 0))) {
      idle_dispatches_ = 0;
      return nullptr;
    }
    if (ready_.empty()) return nullptr;
    if ((++dispatches_ & 0xffff) == 0 && now() > deadline_) return nullptr;
    size_t chosen = 0;
    if (at_random()) chosen = below(unsigned(ready_.size()));
    if (warp_by_warp()) chosen = of_the_same_warp();
    std::swap(ready_.front(), ready_[chosen]);
    Fiber* fiber = ready_.front();
    ready_.pop_front();
    preferred_ = fiber;
    return fiber;
  }

  // The first fiber that is ready in the warp of the latest one; where none is, the first of all.
  size_t of_the_same_warp() const {
    for (size_t i = 0; preferred_ && i < ready_.size(); ++i) {
      const bool same = ready_[i]->block == preferred_->block;
      if (same && ready_[i]->warp() == preferred_->warp()) return i;
    }
    return 0;
  }

  // Whose turn it is among the pending operations: the oldest of a channel, and of the channels the
  // one that has issued last (what should have waited for an older one runs before it), or any.
  size_t eligible() {
    const auto count = unsigned(pending_.size());
    size_t chosen = at_random() ? below(count) : count - 1;
    for (size_t i = 0; warp_by_warp() && i < count; ++i) {
      if (!pending_[i]->waiting.empty()) chosen = i;
    }
    for (size_t i = 0; pending_[chosen]->channel && i < chosen; ++i) {
      if (pending_[i]->channel == pending_[chosen]->channel) return i;
    }
    return chosen;
  }

  void perform(size_t index) {
    Ticket ticket = pending_[index];
    pending_.erase(pending_.begin() + index);
    const Operation* outer = std::exchange(performed, ticket.get());
    ticket->action();
    performed = outer;
    ticket->done = true;
    idle_dispatches_ = 0;
    wake(ticket->waiting);
  }

  std::deque<Fiber*> ready_;
  const Fiber* preferred_ = nullptr;  // its warp goes on
  std::deque<Ticket> pending_;
  std::exception_ptr failure_;
  Context main_;
  unsigned live_ = 0, haste_ = 1;
  uint64_t idle_dispatches_ = 0, dispatches_ = 0, random_ = 0;
  double deadline_ = 0;
};

inline Scheduler scheduler;

inline Fiber& self() { return *scheduler.current; }

// Who is at work, for a message.
inline std::string whereabouts() {
  if (const Operation* operation = scheduler.performed) {
    return format(", in %s of %s", operation->what, name(operation->at).c_str());
  }
  if (!scheduler.current) return "";
  const Site at = self().at;
  return ", " + identity(self()) + (at.file ? " in or after " + name(at) : "");
}

inline Fiber& enter(Site at) {
  self().at = at;
  return self();
}

[[noreturn]] inline void fail(const std::string& text) {
  throw Error(text + whereabouts());
}

[[noreturn]] inline void fail(Site at, const std::string& text) {
  fail(name(at) + ": " + text);
}

inline void Scheduler::fiber_main() {
  Scheduler& s = scheduler;
  try {
    s.body();
    s.current->done = true;
    --s.live_;
    thread_exited(*s.current);
  } catch (...) {
    s.failure_ = std::current_exception();
  }
  Fiber* from = s.current;
  Fiber* to = s.failure_ || !s.live_ ? nullptr : s.next();
  s.current = to;
  from->context.switch_to(to ? to->context : s.main_);
}

}  // namespace simt
