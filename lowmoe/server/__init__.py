"""A local server: one thread owns the model, one stream of events feeds every face.

Knows:        clients, their dialects, how long they wait and when they are gone.
Ignorant of:  how a model is loaded and computed, terminals.

A request's way: guard (who may ask) -> a face (whose dialect) -> Ask -> worker (whose turn) ->
engine's Batch, and back as Events, which the face writes in its dialect.
"""
