// A wild pointer, an index past a `__shared__` array, an assertion or an endless loop in a kernel
// ends the launch with an Error instead of ending the process.
#pragma once
#include <setjmp.h>
#include <signal.h>
#include <sys/syscall.h>

#include "scheduler.h"

extern "C" char __ehdr_start __attribute__((visibility("hidden")));  // of this shared library
extern "C" char etext __attribute__((visibility("hidden")));

namespace simt {

struct Fault {
  int signal = 0;
  const char* address = nullptr;
  const char* instruction = nullptr;
  const char* access = "access";
};

class Faults {
 public:
  // Runs the scheduler; throws what went wrong.
  void guard() {
    Handlers handlers(this);
    if (sigsetjmp(jump_, 1)) throw Error(describe());
    scheduler.run();
  }

  Fault last;

 private:
  static constexpr int CAUGHT[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT};

  static int watchdog_signal() { return SIGRTMAX - 1; }
  static pid_t thread_id() { return pid_t(syscall(SYS_gettid)); }

  struct Handlers {
    struct sigaction saved[6];
    stack_t saved_stack;
    timer_t timer;
    std::vector<char> stack = std::vector<char>(64 << 10);

    explicit Handlers(Faults* faults) {
      active = faults;
      faults->thread_ = thread_id();
      faults->deadline_ = Scheduler::now() + scheduler.seconds + 1;
      stack_t own{};
      own.ss_sp = stack.data();
      own.ss_size = stack.size();
      sigaltstack(&own, &saved_stack);
      struct sigaction action {};
      action.sa_sigaction = &Faults::handle;
      action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
      for (int i = 0; i < 5; ++i) sigaction(CAUGHT[i], &action, &saved[i]);
      sigaction(watchdog_signal(), &action, &saved[5]);
      sigevent event{};
      event.sigev_notify = SIGEV_THREAD_ID;
      event.sigev_signo = watchdog_signal();
      event._sigev_un._tid = faults->thread_;
      timer_create(CLOCK_MONOTONIC, &event, &timer);
      const itimerspec period{{0, 200000000}, {0, 200000000}};
      timer_settime(timer, 0, &period, nullptr);
    }

    ~Handlers() {
      timer_delete(timer);
      for (int i = 0; i < 5; ++i) sigaction(CAUGHT[i], &saved[i], nullptr);
      sigaction(watchdog_signal(), &saved[5], nullptr);
      sigaltstack(&saved_stack, nullptr);
      active = nullptr;
    }
  };

  static void handle(int number, siginfo_t* info, void* context) {
    if (!active || thread_id() != active->thread_) {
      if (number != watchdog_signal()) signal(number, SIG_DFL);  // not ours: it faults again
      return;
    }
    Fault fault{number, static_cast<const char*>(info->si_addr)};
#if defined(__x86_64__)
    const auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    fault.instruction = reinterpret_cast<const char*>(registers[REG_RIP]);
    fault.access = registers[REG_ERR] & 2 ? "write" : "read";
#endif
    if (number == watchdog_signal()) {
      // Only a kernel's own code is left at any instruction; an allocator holds locks.
      const bool in_kernel = fault.instruction >= &__ehdr_start && fault.instruction < &etext;
      if (!in_kernel || Scheduler::now() < active->deadline_) return;
    }
    active->last = fault;
    siglongjmp(active->jump_, 1);
  }

  // The instruction's offset in the library lets the test's side name the line.
  std::string describe() const {
    std::string text;
    if (last.signal == SIGSEGV || last.signal == SIGBUS) {
      if (scheduler.stacks.overflowed(last.address)) {
        text = "stack overflow";
      } else {
        text = format("out-of-bounds %s at address %p", last.access,
                      static_cast<const void*>(last.address));
      }
    } else if (last.signal == SIGILL) {
      text = "index out of an array's bounds";
    } else if (last.signal == SIGFPE) {
      text = "integer division by zero";
    } else if (last.signal == SIGABRT) {
      text = "assertion failed";
    } else {
      text = "the launch takes too long: an endless loop?";
    }
    return text + whereabouts() +
           format(" [instruction %#zx]", size_t(last.instruction - &__ehdr_start));
  }

  static inline Faults* active = nullptr;
  sigjmp_buf jump_;
  pid_t thread_ = 0;
  double deadline_ = 0;
};

inline Faults faults;

}  // namespace simt
