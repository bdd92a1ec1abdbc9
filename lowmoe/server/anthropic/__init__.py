"""Anthropic's dialect: messages, and counting their tokens.

Knows:        Anthropic's field names.
Ignorant of:  models, whose turn it is, other dialects.
"""
