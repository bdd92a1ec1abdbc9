// What the sanitizers of g++ have to be told about fibers; without a sanitizer, nothing.
//
// AddressSanitizer must know on which stack the program is. ThreadSanitizer takes every CUDA thread
// for a thread of its own, orders two of them only where acquires() follows releases() of the same
// token, and must not see what the emulator does for itself.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif

namespace emu {

#if defined(__SANITIZE_THREAD__)
inline constexpr bool kRacesAreSought = true;
#else
inline constexpr bool kRacesAreSought = false;
#endif

// While one lives, ThreadSanitizer sees none of its thread's accesses.
class [[maybe_unused]] Quiet {
 public:
  Quiet(const Quiet&) = delete;
  Quiet& operator=(const Quiet&) = delete;
#if defined(__SANITIZE_THREAD__)
  Quiet() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Quiet() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  Quiet() {}
#endif
};

// What this thread did before releases(token) comes before what another does after acquires(token).
inline void releases([[maybe_unused]] void* token) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(token);
#endif
}
inline void acquires([[maybe_unused]] void* token) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(token);
#endif
}

// The sanitizers' view of one stack.
struct WatchedStack {
  const void* bottom = nullptr;  // unknown of the host's until the first switch away from it
  size_t bytes = 0;
  void* asan = nullptr;
  void* tsan = nullptr;

  // The stack belongs to a new thread, ordered after what the calling one has done.
  void begin() {
#if defined(__SANITIZE_THREAD__)
    tsan = __tsan_create_fiber(0);
#endif
  }

  // Its thread has ended, and another runs; the stack may become other memory.
  void end() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(bottom, bytes);
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_destroy_fiber(tsan);
#endif
  }

  // The stack is the one the program is on.
  void adopt() {
#if defined(__SANITIZE_THREAD__)
    tsan = __tsan_get_current_fiber();
#endif
  }

  // To be called right before the switch, and right after it by whoever goes on.
  void leave_for([[maybe_unused]] const WatchedStack& to) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&asan, to.bottom, to.bytes);
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);
#endif
  }
  void arrive([[maybe_unused]] WatchedStack& host) {
#if defined(__SANITIZE_ADDRESS__)
    const void* from;
    size_t from_bytes;
    __sanitizer_finish_switch_fiber(asan, &from, &from_bytes);
    if (!host.bottom) host.bottom = from, host.bytes = from_bytes;
#endif
  }
};

}  // namespace emu
