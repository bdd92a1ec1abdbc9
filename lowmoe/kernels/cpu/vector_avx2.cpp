#include "lowmoe/kernels/cpu/simd_avx2.h"
#include "lowmoe/kernels/cpu/vector_kernels.h"

namespace lowmoe {
extern const VectorKernels kVectorAvx2;
const VectorKernels kVectorAvx2 = vector::kernels<simd::Avx2>();
}  // namespace lowmoe
