#include "lowmoe/kernels/cpu/isa.h"

namespace lowmoe {
extern const TrellisKernels kTrellisAvx512;
const TrellisKernels kTrellisAvx512{nullptr, nullptr};
}  // namespace lowmoe
