// Functions that can be left in the middle and entered again: one stack each, switched by hand.
//
// swapcontext would do, but asks the kernel for the signal mask each time: 0.3 us against 3 ns, and
// a shuffle of one warp is 32 switches. Signal masks and rounding modes are the same for all here.
#pragma once

#include <cstddef>
#include <cstdint>

#include "sanitizers.h"

// emu_switch(leave, enter): keeps what a called function must not change on the running stack, the
// stack's place in *leave, and goes on where the stack at `enter` was left.
#if defined(__x86_64__)
asm(R"(
.pushsection .text
.p2align 4
.type emu_switch, @function
emu_switch:
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
.size emu_switch, . - emu_switch
.popsection
)");
#elif defined(__aarch64__)
asm(R"(
.pushsection .text
.p2align 4
.type emu_switch, %function
emu_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x2, sp
  str x2, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size emu_switch, . - emu_switch
.popsection
)");
#else
#error "tests/cuda_emulator/fiber.h switches stacks on x86-64 and 64-bit ARM only"
#endif
extern "C" void emu_switch(void** leave, void* enter);

namespace emu {

class Fiber {
 public:
  // The next switch to this fiber calls run() on that stack; run() must not return.
  void begin(char* bottom, size_t bytes, void (*run)()) {
    stack_.bottom = bottom, stack_.bytes = bytes;
    stack_.begin();
    auto** top = reinterpret_cast<void**>(bottom + bytes);
#if defined(__x86_64__)
    // Six registers, where to go on, and a return address of 0 that ends backtraces; after the
    // `ret` the stack is as after a call.
    top[-1] = nullptr;
    top[-2] = reinterpret_cast<void*>(run);
    for (int i = 3; i <= 8; i++) top[-i] = nullptr;
    place_ = top - 8;
#else
    for (int i = 1; i <= 20; i++) top[-i] = nullptr;
    top[-20 + 11] = reinterpret_cast<void*>(run);  // x30, where `ret` goes
    place_ = top - 20;
#endif
  }

  // After run() has switched away for the last time.
  void end() { stack_.end(); }

  // Makes this the fiber of the calling stack.
  void adopt() { stack_.adopt(); }

  // Leaves this fiber, which runs, for another; returns when somebody switches back.
  //   host  the one fiber that was never begun
  __attribute__((no_sanitize("thread"))) void switch_to(Fiber& to, Fiber& host) {
    stack_.leave_for(to.stack_);
    emu_switch(&place_, to.place_);
    stack_.arrive(host.stack_);
  }

  // To be called first by run().
  void arrive(Fiber& host) { stack_.arrive(host.stack_); }

 private:
  void* place_ = nullptr;
  WatchedStack stack_;
};

}  // namespace emu
