"""What the files of checkpoints and model folders are called.

Knows:        names.
Ignorant of:  what is in the files; torch, so that a model can be found before that is imported.
"""

# Of a checkpoint.
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# Of a model folder.
MANIFEST = "manifest.json"
DENSE_FILE = "dense.safetensors"
