"""Weights that come quantized by others, read as if they lay there as numbers.

`quantization_config` reads what config.json says of them, strictly. `integers` holds GPTQ, AWQ and
packed words; `scaled` bytes with scales; `mxfp4` and `normal_floats` 4-bit floats; `packing` is
what they have in common, `codes` the arithmetic.
"""
