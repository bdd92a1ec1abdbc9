// How fast this machine reads memory with the threads that compute.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lowmoe/kernels/cpu/pool.h"

namespace lowmoe {

// Reads n_bytes once, all threads, each a piece at a time; returns seconds. Whoever calls decides
// how much is too much for the caches.
//   data  aligned to 64 bytes
double read_seconds(Pool& pool, const uint8_t* data, size_t n_bytes);

}  // namespace lowmoe
