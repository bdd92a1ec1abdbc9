"""Calls of tools: told from an answer, and forced.

Knows:        which style of calls a model has, by its chat template; which tags are its tokens.
Ignorant of:  how a client spells tools and calls, who makes the calls.
"""
