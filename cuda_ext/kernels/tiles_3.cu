// Prompts: products with 3 planes, in tiles of up to 128 or 32 tokens.
#include "tile_kernels.cuh"

STAMP_TILES(3, 128, 1)
STAMP_TILES(3, 32, 1)  // half of the registers would be a few too few
