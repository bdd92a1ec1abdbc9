// Python's view of the kernels, a file for each room. Here pointers come in as numbers or arrays
// and are checked; the kernels behind trust them.
#pragma once

#include <nanobind/nanobind.h>

#include "lowmoe/kernels/cpu/isa.h"

namespace lowmoe {

namespace nb = nanobind;

// The set of this name.  Raises ValueError for one that this build has not or this processor
// cannot.
const Isa& isa_named(const char* name);

void bind_trellis(nb::module_& m);
void bind_vector(nb::module_& m);
void bind_encoder(nb::module_& m);
void bind_engine(nb::module_& m);
void bind_attention(nb::module_& m);
void bind_states(nb::module_& m);
void bind_experts(nb::module_& m);
void bind_layers(nb::module_& m);

}  // namespace lowmoe
