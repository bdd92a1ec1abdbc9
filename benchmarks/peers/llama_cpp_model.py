"""A GGUF model in llama.cpp, driven through the C interface of its Python binding.

Knows:        llama-cpp-python 0.3.36's low-level names.
Ignorant of:  clocks, what is measured.

Runs in llama.cpp's virtual environment (README.md).
"""

import ctypes
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import llama_cpp as c

LOAD_MODES = {
    # Read into memory of its own, past the page cache: all is in RAM, nothing twice.
    "read": c.LLAMA_LOAD_MODE_DIRECT_IO,
    "mmap": c.LLAMA_LOAD_MODE_MMAP,
}
MAX_VALUE_BYTES = 64

# (tensor, ask) -> wanted, go on: llama.cpp's own words for its evaluation callback.
Watcher = Callable[[int, bool], bool]


@c.llama_log_callback
def _say_nothing(level: int, text: bytes, data: int | None) -> None:
    """Loading prints hundreds of lines."""


class LlamaCppModel:
    """One sequence of tokens in one model.  Use with `with`."""

    def __init__(
        self,
        path: Path,
        *,
        n_threads: int,
        n_context: int,
        repack: bool,
        load_mode: str,
        watcher: Watcher | None = None,
    ) -> None:
        """repack: whether llama.cpp may rearrange weights for its kernels as it loads them."""
        c.llama_log_set(_say_nothing, ctypes.c_void_p())
        c.llama_backend_init()
        model_params = c.llama_model_default_params()
        model_params.n_gpu_layers = 0
        model_params.use_extra_bufts = repack
        model_params.load_mode = LOAD_MODES[load_mode]
        self._model = c.llama_model_load_from_file(str(path).encode(), model_params)
        if not self._model:
            raise SystemExit(f"{path}: llama.cpp cannot load it. Delete it, to make it again.")
        params = c.llama_context_default_params()
        params.n_ctx = n_context
        params.n_threads = params.n_threads_batch = n_threads
        if watcher is not None:
            self._watch = c.ggml_backend_sched_eval_callback(
                lambda tensor, ask, data: watcher(tensor, ask)
            )  # kept, or Python would free what C still calls
            params.cb_eval = self._watch
        self._context = c.llama_init_from_model(self._model, params)
        if not self._context:
            raise SystemExit(f"{path}: llama.cpp has no memory for {n_context} tokens of context.")

    def __enter__(self) -> "LlamaCppModel":
        return self

    def __exit__(self, *exc: object) -> None:
        c.llama_free(self._context)
        c.llama_model_free(self._model)

    @property
    def n_vocab(self) -> int:
        return int(c.llama_vocab_n_tokens(c.llama_model_get_vocab(self._model)))

    def metadata(self, key: str) -> str:
        """What the file says about itself."""
        buffer = ctypes.create_string_buffer(MAX_VALUE_BYTES)
        length = c.llama_model_meta_val_str(self._model, key.encode(), buffer, MAX_VALUE_BYTES)
        if length < 0:
            raise SystemExit(f"the file has no {key}. Make it with benchmarks.peers.gguf_file.")
        return buffer.value.decode()

    def clear(self) -> None:
        """Forget all tokens."""
        c.llama_memory_clear(c.llama_get_memory(self._context), True)

    def forward(self, ids: Sequence[int]) -> None:
        """Run tokens after those before, up to the logits of the last; returns when they are there.

        No more than llama.cpp's n_batch (2048) at once.
        """
        tokens = (c.llama_token * len(ids))(*ids)
        status = c.llama_decode(self._context, c.llama_batch_get_one(tokens, len(ids)))
        if status != 0:
            raise SystemExit(f"llama_decode of {len(ids)} tokens gave {status}, expected 0.")
        c.llama_synchronize(self._context)


def system_info() -> str:
    """Which instructions this build of llama.cpp uses."""
    return str(c.llama_print_system_info().decode()).strip()


if __name__ == "__main__":
    print(json.dumps({"system_info": system_info()}))
