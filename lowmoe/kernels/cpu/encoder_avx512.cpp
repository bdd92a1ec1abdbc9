#include "lowmoe/kernels/cpu/isa.h"
#include "lowmoe/kernels/cpu/encoder.h"

namespace lowmoe {
extern const EncoderKernels kEncoderAvx512;
const EncoderKernels kEncoderAvx512{};
}  // namespace lowmoe
