"""The transformer, knowing kinds and no names: attention, router and experts, layer by layer."""
