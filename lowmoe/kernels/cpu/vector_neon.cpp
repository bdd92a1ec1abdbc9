#include "lowmoe/kernels/cpu/simd_neon.h"
#include "lowmoe/kernels/cpu/vector_kernels.h"

namespace lowmoe {
extern const VectorKernels kVectorNeon;
const VectorKernels kVectorNeon = vector::kernels<simd::Neon>();
}  // namespace lowmoe
