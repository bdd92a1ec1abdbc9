"""OpenAI's dialect: chat, completions, responses, models.

Knows:        OpenAI's field names, and the names that vLLM and llama.cpp added to them.
Ignorant of:  models, whose turn it is, other dialects.
"""
