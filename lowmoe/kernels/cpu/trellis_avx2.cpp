#include "lowmoe/kernels/cpu/isa.h"

namespace lowmoe {
extern const TrellisKernels kTrellisAvx2;
const TrellisKernels kTrellisAvx2{nullptr, nullptr};
}  // namespace lowmoe
