#include "lowmoe/kernels/cpu/isa.h"

namespace lowmoe {
extern const TrellisKernels kTrellisScalar;
const TrellisKernels kTrellisScalar{nullptr, nullptr};
}  // namespace lowmoe
