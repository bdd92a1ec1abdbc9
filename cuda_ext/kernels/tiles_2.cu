// Prompts: products with 2 planes, in tiles of up to 128 or 32 tokens.
#include "tile_kernels.cuh"

STAMP_TILES(2, 128, 1)
STAMP_TILES(2, 32, lowmoe::kSmallTileBlocks)
