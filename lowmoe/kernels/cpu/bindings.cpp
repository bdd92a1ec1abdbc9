#include "lowmoe/kernels/cpu/bindings.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

namespace lowmoe {

const Isa& isa_named(const char* name) {
  size_t count;
  const Isa* const* all = all_isas(&count);
  for (size_t i = 0; i < count; i++) {
    if (std::string(all[i]->name) == name && all[i]->runs_here()) return *all[i];
  }
  throw nb::value_error((std::string("no code for ") + name + " on this processor").c_str());
}

}  // namespace lowmoe

NB_MODULE(_native, m) {
  using namespace lowmoe;
  m.def(
      "isas",
      [] {
        size_t count;
        const Isa* const* all = all_isas(&count);
        std::vector<std::string> names;
        for (size_t i = 0; i < count; i++) {
          if (all[i]->runs_here()) names.push_back(all[i]->name);
        }
        return names;
      },
      "Names of the instruction sets that this processor runs, the best first.");
  bind_trellis(m);
  bind_vector(m);
  bind_encoder(m);
  // A class before those whose functions take it.
  bind_engine(m);
  bind_attention(m);
  bind_states(m);
  bind_experts(m);
  bind_layers(m);
}
