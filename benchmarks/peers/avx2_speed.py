"""How fast is lowmoe beside llama.cpp where neither uses AVX-512?   tokens/s, medians.

Counts:      decode and prefill as decode_speed.py and prefill_speed.py do, lowmoe with
             LOWMOE_ISA=avx2, llama.cpp from a build for AVX2 (README.md), checked by what it says
             of itself.
Leaves out:  what those leave out. Clocks that AVX2-only processors reach: this runs here.

    python -m benchmarks.peers.avx2_speed --peer-python AVX2_VENV/bin/python --work FOLDER \\
        [--measure decode] [--shape mixtral-s] [--tokens 128] [--rounds 5]
"""

from benchmarks.peers.comparison import add_field_arguments, compare, parser_of, workload_of
from benchmarks.peers.contenders import Models

TOO_NEW = ("AVX512 = 1", "AVX_VNNI = 1")


def main() -> None:
    """Print tables, ratios and one JSON object."""
    parser = parser_of(__doc__.splitlines()[0], tokens=128)
    add_field_arguments(parser)
    parser.add_argument("--measure", choices=("prefill", "decode"), default="decode")
    arguments = parser.parse_args()
    models = Models(
        work=arguments.work,
        shape_name=arguments.shape,
        peer_python=arguments.peer_python,
        environment={"LOWMOE_ISA": "avx2"},
    )
    info = models.peer_info()
    for instruction in TOO_NEW:
        if instruction in info:
            raise SystemExit(
                f"{arguments.peer_python} has llama.cpp with {instruction}, but this compares "
                "AVX2. Give the AVX2 build's python (README.md)."
            )
    compare(arguments, models, workload_of(arguments, arguments.measure))


if __name__ == "__main__":
    main()
