// Memory as a kernel sees it: atomics, fences, loads and stores with a hint, cp.async.
#pragma once
#include "block.h"

namespace simt {

// Threads that poll are let go on by the others' turn.
template <class T, class Combine>
T atomic(T* address, Combine combine) {
  scheduler.yield();
  const T old = *address;
  *address = combine(old);
  return old;
}

struct AsyncCopies {
  std::vector<Ticket> open;
  std::deque<std::vector<Ticket>> groups;
};

}  // namespace simt

template <class T>
T atomicAdd(T* address, T value) {
  return simt::atomic(address, [&](T old) { return T(old + value); });
}
template <class T>
T atomicSub(T* address, T value) {
  return simt::atomic(address, [&](T old) { return T(old - value); });
}
template <class T>
T atomicMax(T* address, T value) {
  return simt::atomic(address, [&](T old) { return old < value ? value : old; });
}
template <class T>
T atomicMin(T* address, T value) {
  return simt::atomic(address, [&](T old) { return value < old ? value : old; });
}
template <class T>
T atomicOr(T* address, T value) {
  return simt::atomic(address, [&](T old) { return T(old | value); });
}
template <class T>
T atomicAnd(T* address, T value) {
  return simt::atomic(address, [&](T old) { return T(old & value); });
}
template <class T>
T atomicXor(T* address, T value) {
  return simt::atomic(address, [&](T old) { return T(old ^ value); });
}
template <class T>
T atomicExch(T* address, T value) {
  return simt::atomic(address, [&](T) { return value; });
}
template <class T>
T atomicCAS(T* address, T expected, T value) {
  return simt::atomic(address, [&](T old) { return old == expected ? value : old; });
}
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  return simt::atomic(address, [&](unsigned old) { return old >= limit ? 0 : old + 1; });
}

inline void __threadfence() { simt::scheduler.yield(); }
inline void __threadfence_block() { simt::scheduler.yield(); }
inline void __threadfence_system() { simt::scheduler.yield(); }
inline void __nanosleep(unsigned) { simt::scheduler.yield(); }
[[noreturn]] inline void __trap() { simt::fail("__trap"); }

#define SIMT_LOAD(name)        \
  template <class T>           \
  T name(const T* address) {   \
    return *address;           \
  }
SIMT_LOAD(__ldg)
SIMT_LOAD(__ldcg)
SIMT_LOAD(__ldca)
SIMT_LOAD(__ldcs)
SIMT_LOAD(__ldlu)
SIMT_LOAD(__ldcv)
#undef SIMT_LOAD
#define SIMT_STORE(name)                \
  template <class T>                    \
  void name(T* address, T value) {      \
    *address = value;                   \
  }
SIMT_STORE(__stwb)
SIMT_STORE(__stcg)
SIMT_STORE(__stcs)
SIMT_STORE(__stwt)
#undef SIMT_STORE

inline size_t __cvta_generic_to_shared(const void* pointer) {
  return simt::shared_address(pointer, simt::Site{"__cvta_generic_to_shared", 0});
}

// cp.async under the names of <cuda_pipeline_primitives.h>. What the copy will overwrite is
// undefined from its issue on, and the copy itself is made when somebody waits for it.
inline void __pipeline_memcpy_async(void* destination, const void* source, size_t bytes,
                                    size_t zeros = 0, simt::Site at = simt::Site::here()) {
  if (bytes != 4 && bytes != 8 && bytes != 16) {
    simt::fail(at, simt::format("cp.async copies 4, 8 or 16 bytes, got %zu", bytes));
  }
  if ((uintptr_t(destination) | uintptr_t(source)) % bytes) {
    simt::fail(at, simt::format("cp.async of %zu bytes to or from a misaligned address", bytes));
  }
  if (!simt::in_shared(destination, bytes)) {
    simt::fail(at, "cp.async does not write to shared memory of this block");
  }
  std::memset(destination, simt::UNWRITTEN, bytes);
  auto& copies = simt::self().parts.get<simt::AsyncCopies>();
  copies.open.push_back(simt::scheduler.post(nullptr, "cp.async", at, false, [=] {
    std::memcpy(destination, source, bytes - zeros);
    std::memset(static_cast<char*>(destination) + bytes - zeros, 0, zeros);
  }));
}
inline void __pipeline_commit() {
  auto& copies = simt::self().parts.get<simt::AsyncCopies>();
  copies.groups.push_back(std::move(copies.open));
  copies.open.clear();
}
inline void __pipeline_wait_prior(size_t groups, simt::Site at = simt::Site::here()) {
  auto& copies = simt::self().parts.get<simt::AsyncCopies>();
  while (copies.groups.size() > groups) {
    const std::vector<simt::Ticket> group = std::move(copies.groups.front());
    copies.groups.pop_front();
    for (const simt::Ticket& copy : group) {
      simt::scheduler.await(copy, "__pipeline_wait_prior", at);
    }
  }
}
