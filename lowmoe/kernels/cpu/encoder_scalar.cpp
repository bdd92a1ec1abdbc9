#include "lowmoe/kernels/cpu/encoder_portable.h"
#include "lowmoe/kernels/cpu/encoder_rows.h"
#include "lowmoe/kernels/cpu/isa.h"

namespace lowmoe {

extern const EncoderKernels kEncoderScalar;
const EncoderKernels kEncoderScalar = encoder_kernels<Portable>();

}  // namespace lowmoe
