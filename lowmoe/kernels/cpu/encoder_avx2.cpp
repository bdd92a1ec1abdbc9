#include "lowmoe/kernels/cpu/isa.h"
#include "lowmoe/kernels/cpu/encoder.h"

namespace lowmoe {
extern const EncoderKernels kEncoderAvx2;
const EncoderKernels kEncoderAvx2{};
}  // namespace lowmoe
