"""From a folder to a stream of tokens: text in, token ids through the decoder, text out.

Knows:        tokenizers, chat templates, how the next token is chosen, when to stop.
Ignorant of:  HTTP, terminals, where an expert lives, what the bits mean.
"""
