// A fiber: a stack of its own, and a switch between two of them.
//
// A launch makes millions of switches, and swapcontext makes a system call in each of them, for a
// signal mask that never changes here. On x86-64 the switch therefore saves the registers that the
// calling convention keeps, and nothing else. Other machines take ucontext.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

#if !defined(__x86_64__) || defined(SIMT_UCONTEXT)
#include <ucontext.h>
#endif

namespace simt {

constexpr size_t STACK_BYTES = 256 << 10;

#if defined(__x86_64__) && !defined(SIMT_UCONTEXT)
asm(R"(
.text
.type simt_switch, @function
simt_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size simt_switch, . - simt_switch
)");
void switch_stacks(void** from, void* to) asm("simt_switch");

struct Context {
  void* stack_pointer;

  void start(char* top, void (*entry)()) {
    auto* frame = reinterpret_cast<void**>(top) - 8;  // six registers, the return address, padding
    for (int i = 0; i < 8; ++i) frame[i] = nullptr;
    frame[6] = reinterpret_cast<void*>(entry);
    stack_pointer = frame;
  }
  void switch_to(Context& other) { switch_stacks(&stack_pointer, other.stack_pointer); }
};
#else
struct Context {
  ucontext_t context;

  void start(char* top, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = top - STACK_BYTES / 2;
    context.uc_stack.ss_size = STACK_BYTES / 2;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  void switch_to(Context& other) { swapcontext(&context, &other.context); }
};
#endif

// Stacks are mapped once, each above a page that faults, and used again by every launch.
class Stacks {
 public:
  char* top(size_t index) {
    while (bases_.size() <= index) bases_.push_back(map());
    // Stacks that all end at the same offset in a page would fight for a few cache sets.
    return bases_[index] + STACK_BYTES - (index % 31) * 128;
  }

  bool overflowed(const void* address) const {
    for (const char* base : bases_) {
      if (address >= base && address < base + getpagesize()) return true;
    }
    return false;
  }

 private:
  static char* map() {
    void* base = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED || mprotect(base, getpagesize(), PROT_NONE)) throw std::bad_alloc();
    return static_cast<char*>(base);
  }

  std::vector<char*> bases_;
};

}  // namespace simt
