// The way into a library of emulated kernels, for ctypes.
#pragma once

#include <cstring>
#include <functional>
#include <string>
#include <type_traits>
#include <utility>

#include "launch.h"

namespace emu {

// A kernel by name. Arguments come as with cuLaunchKernel, each as the address of its value; a
// whole number has 8 bytes there, of which an `int` is the first four.
class Kernel {
 public:
  template <class... P>
  Kernel(const char* name, void (*kernel)(P...))
      : name_(name),
        kinds_{kind<P>()...},
        run_([=](void** arguments) { call(kernel, arguments, std::index_sequence_for<P...>{}); }) {
    next_ = std::exchange(first_, this);
  }

  // The kernel of that name, or null.
  static const Kernel* find(const char* name) {
    const Kernel* kernel = first_;
    while (kernel && std::strcmp(kernel->name_, name) != 0) kernel = kernel->next_;
    return kernel;
  }
  static const Kernel* first() { return first_; }
  const Kernel* next() const { return next_; }
  const char* name() const { return name_; }
  const std::function<void(void**)>& run() const { return run_; }

  // What does not fit the kernel's parameters, or an empty string.
  //   kinds  of each argument: p pointer, f float, i whole number
  std::string misfit(const std::string& kinds, void** arguments) const {
    if (kinds.size() != kinds_.size())
      return "got " + std::to_string(kinds.size()) + " arguments, but it has " +
             std::to_string(kinds_.size()) + " parameters";
    for (size_t i = 0; i < kinds.size(); i++) {
      const std::string at = "argument " + std::to_string(i);
      if (kinds[i] != (kinds_[i] == 'l' ? 'i' : kinds_[i]))
        return at + " is of kind " + kinds[i] + ", but its parameter of kind " + kinds_[i];
      if (kinds_[i] != 'i') continue;
      long long value;
      std::memcpy(&value, arguments[i], sizeof(value));
      if (value != static_cast<int>(value))
        return at + " is " + std::to_string(value) + ", but its parameter an int";
    }
    return "";
  }

 private:
  template <class P>
  static constexpr char kind() {
    constexpr bool kWhole = std::is_same_v<P, int> || std::is_same_v<P, long long>;
    static_assert(std::is_pointer_v<P> || std::is_same_v<P, float> || kWhole,
                  "a kernel's parameters are pointers, float, int and long long");
    if (std::is_pointer_v<P>) return 'p';
    if (std::is_same_v<P, float>) return 'f';
    return std::is_same_v<P, int> ? 'i' : 'l';
  }

  template <class... P, size_t... I>
  static void call(void (*kernel)(P...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<P*>(arguments[I])...);
  }

  static inline const Kernel* first_ = nullptr;
  const char* name_;
  std::string kinds_;
  std::function<void(void**)> run_;
  const Kernel* next_;
};

inline std::string answer;  // of the latest launch

inline std::string launch_by_name(const char* name, const unsigned* dims, size_t shared_bytes,
                                  unsigned order, const char* kinds, void** arguments) {
  const Kernel* kernel = Kernel::find(name);
  if (!kernel) return "no EXPORT_KERNEL of that name";
  const dim3 grid(dims[0], dims[1], dims[2]), block(dims[3], dims[4], dims[5]);
  if (const std::string misfit = kernel->misfit(kinds, arguments); !misfit.empty()) return misfit;
  machine.kernel = &kernel->run(), machine.arguments = arguments;
  return launch(grid, block, shared_bytes, order);
}

}  // namespace emu

extern "C" {

// Runs a kernel; returns why it could not, or could not end, and "" if it did.
//   dims   grid x, y, z, block x, y, z
//   order  emu::Order
//   kinds  see emu::Kernel::misfit
[[gnu::visibility("default"), gnu::used]] inline const char* emu_launch(
    const char* name, const unsigned* dims, size_t shared_bytes, unsigned order, const char* kinds,
    void** arguments) {
  return (emu::answer = emu::launch_by_name(name, dims, shared_bytes, order, kinds, arguments))
      .c_str();
}

// The name of kernel i, or null when there are fewer.
[[gnu::visibility("default"), gnu::used]] inline const char* emu_kernel_name(unsigned i) {
  const emu::Kernel* kernel = emu::Kernel::first();
  for (; kernel && i; i--) kernel = kernel->next();
  return kernel ? kernel->name() : nullptr;
}
}
