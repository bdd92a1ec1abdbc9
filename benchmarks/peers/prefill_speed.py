"""How fast does lowmoe prefill beside llama.cpp, in RAM?   tokens/s, medians, 512 tokens at once.

Counts:      one pass over --tokens random tokens up to the logits of the last; each side in a
             process of its own, in turns. A prefill reads its weights once for all tokens: it is
             bound by arithmetic, and "of RAM" says nothing here.
Leaves out:  loading, one warm-up sample a turn, choosing tokens.

    python -m benchmarks.peers.prefill_speed --peer-python VENV/bin/python --work FOLDER \\
        [--shape mixtral-s] [--tokens 512] [--rounds 5] [--autogroup-nice -10]
"""

from benchmarks.peers.comparison import ask


def main() -> None:
    """Print tables, ratios and one JSON object."""
    ask(__doc__.splitlines()[0], "prefill", tokens=512)


if __name__ == "__main__":
    main()
