"""Hands out experts, wherever they live: `store` lends them, `source` reads them from disk,
`tier` holds them in RAM, `policy` says which ones stay, `ledger` counts what was moved.
"""
