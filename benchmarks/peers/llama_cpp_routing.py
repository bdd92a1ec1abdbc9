"""How evenly do random tokens spread over the experts of a GGUF file?   One JSON line.

Counts:      the n_active highest router logits of every token in every layer but
             the last.

    python -m benchmarks.peers.llama_cpp_routing FILE

Runs in llama.cpp's virtual environment (README.md).
"""

import argparse
import ctypes
import json
import os
import random
from pathlib import Path

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.evenness import N_TOKENS, evenness_of, require_even
from benchmarks.peers.llama_cpp_model import LlamaCppModel

LOGITS = b"ffn_moe_logits-"


class RouterLogits:
    """Listens to llama.cpp's graph and keeps every layer's router logits."""

    def __init__(self) -> None:
        self.by_layer: dict[int, bytes] = {}
        library = Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"
        ggml = ctypes.CDLL(str(library))
        ggml.ggml_get_name.restype = ctypes.c_char_p
        ggml.ggml_nbytes.restype = ctypes.c_size_t
        self._ggml = ggml

    def __call__(self, tensor: int, ask: bool) -> bool:
        at = ctypes.c_void_p(tensor)
        name: bytes = self._ggml.ggml_get_name(at)
        if not name.startswith(LOGITS):
            return not ask  # asked: not wanted; otherwise: go on
        if not ask:
            self.by_layer[int(name[len(LOGITS) :])] = self._copy(at)
        return True

    def _copy(self, at: ctypes.c_void_p) -> bytes:
        size = self._ggml.ggml_nbytes(at)
        buffer = ctypes.create_string_buffer(size)
        self._ggml.ggml_backend_tensor_get(at, buffer, ctypes.c_size_t(0), ctypes.c_size_t(size))
        return buffer.raw


def use_counts(logits: bytes, n_experts: int, n_active: int) -> NDArray[np.int64]:
    """How many tokens chose each expert, [E].  logits: [T, E] float32."""
    scores = np.frombuffer(logits, np.float32).reshape(-1, n_experts)
    if not np.isfinite(scores).all():
        raise SystemExit("router logits are not finite: the file's weights overflow.")
    chosen = np.argpartition(-scores, n_active - 1, axis=1)[:, :n_active]
    return np.bincount(chosen.reshape(-1), minlength=n_experts)


def main() -> None:
    """Print one JSON object; fail if too few experts do the work."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    listener = RouterLogits()
    with LlamaCppModel(
        arguments.file,
        n_threads=os.cpu_count() or 1,
        n_context=N_TOKENS,
        repack=False,
        load_mode="mmap",
        watcher=listener,
    ) as model:
        generator = random.Random(0)
        model.forward([generator.randrange(model.n_vocab) for _ in range(N_TOKENS)])
        graph = model.metadata("general.architecture")
        n_experts = int(model.metadata(f"{graph}.expert_count"))
        n_active = int(model.metadata(f"{graph}.expert_used_count"))
    # The last layer runs for the last token only: nothing comes after that needs the others.
    whole = N_TOKENS * n_experts * np.dtype(np.float32).itemsize
    layers = [listener.by_layer[i] for i in sorted(listener.by_layer)]
    counts = [use_counts(x, n_experts, n_active) for x in layers if len(x) == whole]
    evenness = evenness_of(counts)
    require_even(str(arguments.file), evenness)
    print(json.dumps(evenness))


if __name__ == "__main__":
    main()
