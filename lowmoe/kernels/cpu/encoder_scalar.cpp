#include "lowmoe/kernels/cpu/isa.h"
#include "lowmoe/kernels/cpu/encoder.h"

namespace lowmoe {
extern const EncoderKernels kEncoderScalar;
const EncoderKernels kEncoderScalar{};
}  // namespace lowmoe
