"""Random blocks of ggml's quantized types, their weights of a wanted spread.

Knows:        where each type keeps its scales.
Ignorant of:  tensors, files.  What codes mean: gguf's own decoder says that.

Runs in llama.cpp's virtual environment (README.md).
"""

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
# Byte offset of a block's float16 scale.
SCALE_OFFSETS = {
    Type.Q8_0: 0, Type.Q4_0: 0, Type.Q2_K: 80, Type.Q3_K: 108, Type.Q4_K: 0, Type.Q5_K: 0,
    Type.Q6_K: 208, Type.IQ2_XS: 0,
}  # fmt: skip
# Byte offset of the scale of a block's minimum, and the mean code: with a minimum of so many
# scales the weights of random codes have mean 0.
MINIMA = {Type.Q2_K: (82, 1.5), Type.Q4_K: (2, 7.5), Type.Q5_K: (2, 15.5)}
N_JUDGED = 4096  # blocks decoded to find out how far a type's weights spread


def random_blocks(
    type: Type, count: int, deviation: float, random: np.random.Generator
) -> NDArray[np.uint8]:
    """[count, bytes of a block]: weights with mean 0 and this standard deviation.

    Every block has a sign of its own. Codes of Q4_0, Q3_K and Q6_K have mean -1/2, which would add
    one direction to all outputs, and with it send all tokens to the same few experts.
    """
    if type == Type.F32:
        values = random.standard_normal((count, 1), dtype=np.float32) * np.float32(deviation)
        return values.view(np.uint8)
    _, block_bytes = gguf.GGML_QUANT_SIZES[type]
    blocks = random.integers(0, 256, (count, block_bytes), dtype=np.uint8)
    judged = blocks[:N_JUDGED].copy()
    _set_scales(judged, type, np.ones((len(judged), 1)))
    spread = float(np.std(gguf.quants.dequantize(judged, type)))
    signs = random.choice([-1.0, 1.0], (count, 1))
    # Equal scales would let a row's blocks cancel more than real weights do.
    uneven = 0.8 + 0.4 * random.random((count, 1))
    _set_scales(blocks, type, signs * uneven * deviation / spread)
    return blocks


def _set_scales(blocks: Bytes, type: Type, scales: NDArray[np.float64]) -> None:
    _put(blocks, SCALE_OFFSETS[type], scales)
    if type in MINIMA:
        offset, mean_code = MINIMA[type]
        _put(blocks, offset, scales * mean_code)


def _put(blocks: Bytes, offset: int, values: NDArray[np.float64]) -> None:
    blocks[:, offset : offset + 2] = values.astype(np.float16).view(np.uint8)
