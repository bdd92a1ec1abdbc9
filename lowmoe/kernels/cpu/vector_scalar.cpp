#include "lowmoe/kernels/cpu/simd_scalar.h"
#include "lowmoe/kernels/cpu/vector_kernels.h"

namespace lowmoe {
extern const VectorKernels kVectorScalar;
const VectorKernels kVectorScalar = vector::kernels<simd::Scalar>();
}  // namespace lowmoe
