"""What the bits of a weight mean: trellis planes, nf4, plain dtypes.

Nothing of lowmoe, and torch only, but for nf4, which bitsandbytes codes and is imported for on
first use.

`layout` draws the bits, `trellis` reads them, `encode` chooses them by searching with `viterbi`,
slow and right, `transform` turns weights and activations into the basis they are coded in, `matrix`
and `expert` are what the rest of the house holds in its hands, `damage` says what a code has cost.
"""
