"""Files in, tensors out, and back: the only room that touches a model's files.

`files` is the one module that calls the operating system; `safetensors_file` reads containers,
`reader` checkpoints, `layout` says where everything lies in a model folder, `manifest` records it,
`writer` makes a folder crash-safe, `folder` reads it back with every byte checked.
"""
