#include "lowmoe/kernels/cpu/isa.h"

namespace lowmoe {
extern const VectorKernels kVectorScalar;
const VectorKernels kVectorScalar{};
}  // namespace lowmoe
