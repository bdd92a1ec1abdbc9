#include "lowmoe/kernels/cpu/isa.h"

namespace lowmoe {
extern const VectorKernels kVectorAvx2;
const VectorKernels kVectorAvx2{};
}  // namespace lowmoe
