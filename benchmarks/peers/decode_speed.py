"""How fast does lowmoe decode beside llama.cpp, in RAM?   tokens/s, medians, one token at a time.

Counts:      passes of one random token each, at positions 1 to --tokens, up to its logits; each
             side in a process of its own, in turns. "of RAM" is the share of the read bandwidth
             measured right before and after a turn that the weights of its tokens took.
Leaves out:  loading, one warm-up sample a turn, choosing tokens; bytes of the KV cache.

    python -m benchmarks.peers.decode_speed --peer-python VENV/bin/python --work FOLDER \\
        [--shape mixtral-s] [--tokens 128] [--rounds 5] [--autogroup-nice -10]
"""

from benchmarks.peers.comparison import ask


def main() -> None:
    """Print tables, ratios and one JSON object."""
    ask(__doc__.splitlines()[0], "decode", tokens=128)


if __name__ == "__main__":
    main()
