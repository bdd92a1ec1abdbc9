"""From a checkpoint to a model folder: `hub` fetches shards, `calibrate` measures activations,
`convert` streams the layers through, `synthetic` writes folders of random codes for benchmarks.
"""
