#include "lowmoe/kernels/cpu/simd_avx512.h"
#include "lowmoe/kernels/cpu/vector_kernels.h"

namespace lowmoe {
extern const VectorKernels kVectorAvx512;
const VectorKernels kVectorAvx512 = vector::kernels<simd::Avx512>();
}  // namespace lowmoe
