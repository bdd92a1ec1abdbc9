"""How many tokens a second does llama.cpp prefill or decode?   tokens/s, one JSON line.

Counts:      llama_decode of random tokens up to the logits of the last one: all at once (prefill)
             or one by one after a first (decode), the cache emptied before every sample.
Leaves out:  loading, choosing tokens, warm-up runs.

    python -m benchmarks.peers.llama_cpp_timing FILE --measure decode --tokens 128 --threads 2

Runs in llama.cpp's virtual environment (README.md).
"""

import argparse
import json
from pathlib import Path

from benchmarks.peers.gguf_file import BYTES_PER_TOKEN_KEY
from benchmarks.peers.llama_cpp_model import LOAD_MODES, LlamaCppModel, system_info
from benchmarks.peers.samples import add_sample_arguments, take_samples


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--no-repack", action="store_true")
    parser.add_argument("--load-mode", choices=LOAD_MODES, default="read")
    add_sample_arguments(parser)
    arguments = parser.parse_args()
    with LlamaCppModel(
        arguments.file,
        n_threads=arguments.threads,
        n_context=arguments.tokens + 1,
        repack=not arguments.no_repack,
        load_mode=arguments.load_mode,
    ) as model:
        samples = take_samples(
            model.clear, model.forward, n_vocab=model.n_vocab, arguments=arguments
        )
        ram_bytes = float(model.metadata(BYTES_PER_TOKEN_KEY))
    print(
        json.dumps(
            {
                "engine": f"llama.cpp, {system_info()}",
                "bytes_per_token": ram_bytes,
                "samples": samples,
            }
        )
    )


if __name__ == "__main__":
    main()
