"""From a folder to a stream of tokens: `load` assembles, `generate` runs, `sampling` chooses,
`text` spells, `statistics` says how it went, `evaluate` how much a code has cost.
"""
