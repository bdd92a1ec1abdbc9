#include "lowmoe/kernels/cpu/bindings.h"

namespace lowmoe {
void bind_encoder(nb::module_& m) { (void)m; }
}  // namespace lowmoe
