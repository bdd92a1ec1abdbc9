#pragma once

namespace lowmoe {
struct EncoderKernels {};
}  // namespace lowmoe
