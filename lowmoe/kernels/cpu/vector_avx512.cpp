#include "lowmoe/kernels/cpu/isa.h"

namespace lowmoe {
extern const VectorKernels kVectorAvx512;
const VectorKernels kVectorAvx512{};
}  // namespace lowmoe
