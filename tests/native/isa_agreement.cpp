// Does every instruction set that runs here compute what the scalar one does?
//
// Bit for bit where isa.h says so, elsewhere within what the order of roundings explains. One line
// for each set and kernel; the exit code is 1 if any differs.
#include "tests/native/agreement.h"

int main() {
  using namespace lowmoe;
  size_t count;
  const Isa* const* all = all_isas(&count);
  const Isa& scalar = *all[count - 1];
  size_t n_compared = 0;
  for (size_t i = 0; i + 1 < count; i++) {
    if (!all[i]->runs_here()) {
      std::printf("left out: %s, which this processor does not run\n", all[i]->name);
      continue;
    }
    agreement::compare_trellis(*all[i], scalar);
    agreement::compare_vector(*all[i], scalar);
    agreement::compare_attention(*all[i], scalar);
    agreement::compare_encoder(*all[i], scalar);
    n_compared++;
  }
  if (n_compared == 0) std::printf("nothing compared: this processor runs only scalar code\n");
  return n_compared == 0 || agreement::Check::failures > 0;
}
