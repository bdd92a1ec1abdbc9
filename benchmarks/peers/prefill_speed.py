"""How fast does lowmoe prefill beside llama.cpp, in RAM?   tokens/s, medians, 512 tokens at once.

Counts:      one pass over --tokens random tokens up to the logits of the last; each side in a
             process of its own, in turns. A prefill reads its weights once for all tokens: it is
             bound by arithmetic, and "of RAM" says nothing here.
Leaves out:  loading, one warm-up sample a turn, choosing tokens.

    python -m benchmarks.peers.prefill_speed --peer-python VENV/bin/python --work FOLDER \\
        [--shape mixtral-s] [--tokens 512] [--rounds 5] [--autogroup-nice -10]
"""

from benchmarks.peers.comparison import add_field_arguments, compare, parser_of, workload_of
from benchmarks.peers.contenders import Models


def main() -> None:
    """Print tables, ratios and one JSON object."""
    parser = parser_of(__doc__.splitlines()[0], tokens=512)
    add_field_arguments(parser)
    arguments = parser.parse_args()
    models = Models(
        work=arguments.work, shape_name=arguments.shape, peer_python=arguments.peer_python
    )
    compare(arguments, models, workload_of(arguments, "prefill"))


if __name__ == "__main__":
    main()
