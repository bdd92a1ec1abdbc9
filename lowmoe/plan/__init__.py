"""Will a model run on a machine, at which width, how fast: answered before a byte is downloaded.

`sizes` counts bytes, `memory` says where they go, `skew` how often they are found there,
`cost` how long a token takes, `planner` makes rows of that; `machine` is what it is all asked of.
Docs: docs/plan.md.
"""
