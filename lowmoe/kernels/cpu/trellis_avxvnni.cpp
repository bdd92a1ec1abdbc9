#include "lowmoe/kernels/cpu/isa.h"

namespace lowmoe {
extern const TrellisKernels kTrellisAvxVnni;
const TrellisKernels kTrellisAvxVnni{nullptr, nullptr};
}  // namespace lowmoe
