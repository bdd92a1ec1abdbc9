// Where the time of native calls goes, as thread 0 sees it.
#pragma once

#include <chrono>
#include <cstdint>
#include <cstring>

namespace lowmoe {

class Profile {
 public:
  static constexpr int kMostPhases = 32;

  // name: a string literal.
  struct Phase {
    const char* name = nullptr;
    uint64_t nanoseconds = 0;
    uint64_t count = 0;
  };

  bool enabled = false;

  void add(const char* name, uint64_t nanoseconds) {
    for (Phase& phase : phases_) {
      if (phase.name == nullptr) phase.name = name;
      if (std::strcmp(phase.name, name) != 0) continue;
      phase.nanoseconds += nanoseconds;
      phase.count++;
      return;
    }
  }
  void clear() {
    for (Phase& phase : phases_) phase = {};
  }
  const Phase* begin() const { return phases_; }
  const Phase* end() const { return phases_ + kMostPhases; }

  // Times one phase on thread 0; costs nothing on others and when disabled.
  class Clock {
   public:
    Clock(Profile& profile, int thread)
        : profile_(profile.enabled && thread == 0 ? &profile : nullptr) {
      if (profile_) last_ = now();
    }
    void worked(const char* phase) {
      if (profile_) take(phase);
    }
    void waited() {
      if (profile_) take(kWaiting);
    }

   private:
    static std::chrono::steady_clock::time_point now() { return std::chrono::steady_clock::now(); }
    void take(const char* name) {
      const auto then = last_;
      last_ = now();
      profile_->add(name, std::chrono::nanoseconds(last_ - then).count());
    }
    Profile* profile_;
    std::chrono::steady_clock::time_point last_;
  };

  static constexpr const char* kWaiting = "waiting for threads";

 private:
  Phase phases_[kMostPhases];
};

}  // namespace lowmoe
