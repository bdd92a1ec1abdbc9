#include "lowmoe/kernels/cpu/encoder_portable.h"
#include "lowmoe/kernels/cpu/encoder_rows.h"
#include "lowmoe/kernels/cpu/isa.h"

namespace lowmoe {

// Lanes in plain C++, which compilers turn into NEON.
extern const EncoderKernels kEncoderNeon;
const EncoderKernels kEncoderNeon = encoder_kernels<Portable>();

}  // namespace lowmoe
