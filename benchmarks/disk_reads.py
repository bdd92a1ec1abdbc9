"""How much of the disk's speed do expert reads reach under decode?   GB/s (1e9), over several runs.

    python benchmarks/disk_reads.py [--ram 1300MB] [--runs 5] [--new-tokens 2]

Counts:      bytes of expert reads over the seconds in which at least one was under way, while a
             synthetic model about twice as large as --ram decodes random tokens.
Ceiling:     plain reads of the same spans, same sizes, same number of threads, past the page cache,
             nothing done with them, in the same run before and after.
Leaves out:  writing the model, one warm-up run.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import lowmoe
from lowmoe.checkpoint.layout import Recipe
from lowmoe.engine.bench import BenchOptions, bench, disk_bandwidth
from lowmoe.engine.machine import machine_line
from lowmoe.families import read_config
from lowmoe.families.aliases import ALIASES
from lowmoe.loader.synthetic import write_synthetic

# Experts of Mixtral-8x7B's shape, fewer layers: 45 MB an expert at 2 bits.
SHAPE = {**ALIASES["mixtral-8x7b"].config, "num_hidden_layers": 6, "vocab_size": 1024}


def main() -> None:
    """Print the rates and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ram", default="1300MB")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=2)
    arguments = parser.parse_args()
    print(machine_line())
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as work:
        folder = Path(work) / "model"
        write_synthetic(
            folder,
            SHAPE,
            read_config(SHAPE),
            Recipe(expert_planes=1),
            name="synthetic",
            progress=lambda done, total: None,
        )
        size = sum(f.stat().st_size for f in folder.iterdir())
        with lowmoe.load(folder, gpu="none", ram=arguments.ram, context=128) as model:
            assert model.runtime.folder is not None
            direct_before = disk_bandwidth(model.runtime.folder)
            result = bench(
                model.runtime,
                BenchOptions(runs=arguments.runs, prompt_tokens=1, new_tokens=arguments.new_tokens),
                lambda done, total: None,
            )
            direct = model.runtime.folder.direct()
    assert result.disk_ceiling_bytes_per_s is not None
    assert result.disk_read_bytes_per_s is not None
    ceiling = statistics.mean([direct_before, result.disk_ceiling_bytes_per_s])
    share = result.disk_read_bytes_per_s / ceiling
    print(f"model {size / 1e9:.2f} GB, RAM budget {arguments.ram}, past the page cache: {direct}")
    print(
        f"while decoding {result.disk_read_bytes_per_s / 1e9:.2f} GB/s, plain reads before "
        f"{direct_before / 1e9:.2f}, after {result.disk_ceiling_bytes_per_s / 1e9:.2f}: {share:.0%}"
    )
    print(
        json.dumps(
            {"machine": machine_line(), "share": share, "model_bytes": size, **result.to_json()}
        )
    )


if __name__ == "__main__":
    main()
