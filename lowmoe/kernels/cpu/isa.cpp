#include "lowmoe/kernels/cpu/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace lowmoe {

#if defined(__x86_64__)

extern const TrellisKernels kTrellisAvx512, kTrellisAvxVnni, kTrellisAvx2;
extern const VectorKernels kVectorAvx512, kVectorAvx2;
extern const EncoderKernels kEncoderAvx512, kEncoderAvx2;

namespace {

// Two features that __builtin_cpu_supports of GCC 12 or Clang 14 has no name for.
bool has_f16c() {
  uint32_t a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;
}

bool has_avx_vnni() {
  constexpr uint32_t kAvxVnni = 1 << 4;
  uint32_t a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && a >= 1 &&
         __get_cpuid_count(7, 1, &a, &b, &c, &d) && a & kAvxVnni;
}

bool runs_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi2") && has_f16c();
}

bool runs_avx_vnni() { return runs_avx2() && has_avx_vnni(); }

bool runs_avx512() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
}

constexpr Isa kAvx512{"avx512", runs_avx512, &kTrellisAvx512, &kVectorAvx512, &kEncoderAvx512};
constexpr Isa kAvxVnni{"avxvnni", runs_avx_vnni, &kTrellisAvxVnni, &kVectorAvx2, &kEncoderAvx2};
constexpr Isa kAvx2{"avx2", runs_avx2, &kTrellisAvx2, &kVectorAvx2, &kEncoderAvx2};

}  // namespace

#elif defined(__aarch64__)

extern const TrellisKernels kTrellisNeon;
extern const VectorKernels kVectorNeon;
extern const EncoderKernels kEncoderNeon;

namespace {

bool runs_neon() {
#if defined(__linux__)
  constexpr unsigned long kDotProducts = 1ul << 20;  // HWCAP_ASIMDDP
  return getauxval(AT_HWCAP) & kDotProducts;
#else
  return true;  // every Apple processor with this architecture's name has dot products
#endif
}

constexpr Isa kNeon{"neon", runs_neon, &kTrellisNeon, &kVectorNeon, &kEncoderNeon};

}  // namespace

#endif

extern const TrellisKernels kTrellisScalar;
extern const VectorKernels kVectorScalar;
extern const EncoderKernels kEncoderScalar;

namespace {

bool runs_everywhere() { return true; }

constexpr Isa kScalar{"scalar", runs_everywhere, &kTrellisScalar, &kVectorScalar, &kEncoderScalar};

constexpr const Isa* kAll[] = {
#if defined(__x86_64__)
    &kAvx512,
    &kAvxVnni,
    &kAvx2,
#elif defined(__aarch64__)
    &kNeon,
#endif
    &kScalar,
};

}  // namespace

const Isa* const* all_isas(size_t* count) {
  *count = sizeof kAll / sizeof *kAll;
  return kAll;
}

const Isa& best_isa() {
  for (const Isa* isa : kAll) {
    if (isa->runs_here()) return *isa;
  }
  return kScalar;
}

}  // namespace lowmoe
