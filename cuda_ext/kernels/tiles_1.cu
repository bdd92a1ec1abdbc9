// Prompts: products with 1 plane, in tiles of up to 128 or 32 tokens.
#include "tile_kernels.cuh"

STAMP_TILES(1, 128, 1)
STAMP_TILES(1, 32, lowmoe::kSmallTileBlocks)
