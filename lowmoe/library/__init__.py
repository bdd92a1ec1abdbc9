"""The models on this machine: what a name stands for, and making a model folder out of it.

    LOWMOE_HOME/models/NAME      model folders, finished or not
    LOWMOE_HOME/work/NAME        what a pull has under way

`names` finds, lists and removes, `verify` checks, `configs` knows shapes; `making` makes, by
`options`, what fits by `budgets`, on the text of `calibration`, of GGUF files that `gguf_pulls`
fetches too. `optimize` adds what is popular, `early_reads` begins before torch is there.
"""
