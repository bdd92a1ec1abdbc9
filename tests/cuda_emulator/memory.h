// How threads reach memory: atomic operations, fences, loads with a hint, copies in the background.
#pragma once

#include <concepts>

#include "machine.h"

namespace emu {

// *at = change(*at), in one step; returns what was there. It orders memory only together with
// fences, as in C++: what this thread did before a fence and such an operation, that operation
// included, others see after their own on *at and a fence. Floating point has none here: results
// that depend on who came first are banned.
template <std::integral T, class Change>
T atomic(T* at, Change change) {
  T was = __atomic_load_n(at, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(at, &was, change(was), true, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED)) {
  }
  const Quiet quiet;
  Thread* self = machine.self;
  if (self->fenced) releases(at);
  self->fenced = false, self->last_atomic = at;
  return was;
}

inline void fence() {
  const Quiet quiet;
  Thread* self = machine.self;
  self->fenced = true;
  if (self->last_atomic) acquires(self->last_atomic);
}

}  // namespace emu

template <class T>
T atomicAdd(T* at, std::type_identity_t<T> by) {
  using Unsigned = std::make_unsigned_t<T>;  // wraps around
  return emu::atomic(at, [=](T was) {
    return static_cast<T>(static_cast<Unsigned>(was) + static_cast<Unsigned>(by));
  });
}
template <class T>
T atomicSub(T* at, std::type_identity_t<T> by) {
  return atomicAdd(at, static_cast<T>(0 - static_cast<std::make_unsigned_t<T>>(by)));
}
template <class T>
T atomicMax(T* at, std::type_identity_t<T> other) {
  return emu::atomic(at, [=](T was) { return was < other ? other : was; });
}
template <class T>
T atomicMin(T* at, std::type_identity_t<T> other) {
  return emu::atomic(at, [=](T was) { return other < was ? other : was; });
}
template <class T>
T atomicAnd(T* at, std::type_identity_t<T> other) {
  return emu::atomic(at, [=](T was) { return was & other; });
}
template <class T>
T atomicOr(T* at, std::type_identity_t<T> other) {
  return emu::atomic(at, [=](T was) { return was | other; });
}
template <class T>
T atomicExch(T* at, std::type_identity_t<T> now) {
  return emu::atomic(at, [=](T) { return now; });
}
template <class T>
T atomicCAS(T* at, std::type_identity_t<T> expected, std::type_identity_t<T> now) {
  return emu::atomic(at, [=](T was) { return was == expected ? now : was; });
}
inline unsigned atomicInc(unsigned* at, unsigned last) {
  return emu::atomic(at, [=](unsigned was) { return was >= last ? 0 : was + 1; });
}

inline void __threadfence() { emu::fence(); }
inline void __threadfence_block() { emu::fence(); }

template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class T>
T __ldcg(const T* from) {
  return *from;
}
template <class T>
T __ldcs(const T* from) {
  return *from;
}
template <class T>
void __stcg(T* to, T value) {
  *to = value;
}
template <class T>
void __stcs(T* to, T value) {
  *to = value;
}

namespace emu {

// The bytes are gone at once and there no sooner than the wait: on a card both may happen any time
// in between.
inline void cp_async16(void* to, const void* from) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16)
    fail("cp.async of 16 bytes, but an address is no multiple of 16");
  const unsigned gone = 0x01010101u * kUnwritten[machine.order != kForward];
  *static_cast<uint4*>(to) = uint4{gone, gone, gone, gone};
  const Quiet quiet;
  Thread* self = machine.self;
  self->copies.push_back(
      {static_cast<uint4*>(to), static_cast<const uint4*>(from), self->n_groups});
}

inline void cp_async_commit() {
  const Quiet quiet;
  machine.self->n_groups++;
}

inline void cp_async_wait(unsigned n_pending) {
  Thread* self = machine.self;
  size_t n = 0;
  for (; n < self->copies.size() && self->copies[n].group + n_pending < self->n_groups; n++)
    *self->copies[n].to = *self->copies[n].from;  // the thread's own accesses
  const Quiet quiet;
  self->copies.erase(self->copies.begin(), self->copies.begin() + static_cast<ptrdiff_t>(n));
}

}  // namespace emu
