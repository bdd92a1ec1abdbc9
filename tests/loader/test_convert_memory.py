"""Does a conversion need memory for a few experts, however many the checkpoint holds?

The bulk of the checkpoint is converted to bf16: every byte of it is read, calibrated with and
written as in any format. Choosing codes holds one matrix at a time, so there a few experts are
enough to see what it needs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lowmoe.checkpoint.file_names import INDEX
from lowmoe.families import read_config
from lowmoe.spec import checkpoint_tensors
from tests.checkpoint.tiny_mixtral import config_with

N_TOKENS = 768
MIB = 2**20
# What the first matrix products of a process take for themselves: threads, code, MKL's buffers.
PROCESS_BYTES = 32 * MIB
# glibc maps blocks of 32 MB and more, as a real expert's matrices are, and gives each back when it
# is freed. Smaller ones leave holes in its heap, up to 200 MB of them, never twice the same. The
# experts here are small, so the threshold is too.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536"}
# What the encoder adds: 64 rows at a time and planes, of matrices of a few MB.
CODING_BYTES = 8 * MIB
WIDE = {
    "hidden_size": 1024,
    "intermediate_size": 1024,
    "num_local_experts": 32,
    "num_hidden_layers": 2,
}
PROGRAM = """
import json, sys
from pathlib import Path
from lowmoe.checkpoint.layout import Recipe
from tests.checkpoint.tiny_mixtral import Options, convert

def peak_bytes():
    # Not ru_maxrss: that counts what the parent had when it started this process.
    line = next(l for l in open("/proc/self/status") if l.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

source, folder, format, n_tokens = sys.argv[1:]
before = peak_bytes()
options = Options(recipe=Recipe(format=format), n_threads=2, lengths=(int(n_tokens) // 3,) * 3)
convert(Path(source), Path(folder), options)
print(json.dumps({"before": before, "after": peak_bytes()}))
"""


def write_wide_mixtral(folder: Path, **changes: int) -> int:
    """A checkpoint of little but experts, a shard a layer.  Returns its bytes."""
    config = config_with(vocab_size=128, **changes)
    family, generator = read_config(config), torch.Generator().manual_seed(0)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    # One matrix of each shape for all: filling 400 MB at random would take longer than the test.
    shapes = {shape for _, shape in checkpoint_tensors(family.spec)}
    matrices = {s: (torch.randn(s, generator=generator) * 0.03).bfloat16() for s in shapes}
    by_shard: dict[str, dict[str, Tensor]] = {}
    for role, shape in checkpoint_tensors(family.spec):
        shard = by_shard.setdefault(f"model-{role.layer_id}.safetensors", {})
        shard[family.tensor_name(role)] = matrices[shape]
    for file, tensors in by_shard.items():
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / file)
    index = {name: file for file, tensors in by_shard.items() for name in tensors}
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def peak(source: Path, folder: Path, format: str) -> dict[str, int]:
    """Peak bytes in RAM before and after a conversion."""
    command = [sys.executable, "-c", PROGRAM, str(source), str(folder), format, str(N_TOKENS)]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(sys.path)}
    output = subprocess.run(command, env=environment, check=True, capture_output=True).stdout
    found: dict[str, int] = json.loads(output)
    return found


def allowed(hidden: int) -> int:
    """What may be alive at once, by the bytes of one float32 matrix [hidden, hidden].

    Of an expert, 3 matrices: read in half that, gate and up joined in as much again, and made
    float32 to multiply with: 5 at most. Of a layer's q, k, v and output: 3, and while they are
    joined twice. The tokens' states: before and after attention and experts, normed, as an
    expert's share, as bytes to be written: 8 versions.
    """
    return (5 + 2 * 3) * 4 * hidden**2 + 8 * 4 * N_TOKENS * hidden + PROCESS_BYTES


def test_the_memory_a_conversion_takes_is_not_its_checkpoints(tmp_path: Path) -> None:
    n_bytes = write_wide_mixtral(tmp_path / "checkpoint", **WIDE)
    assert n_bytes > 400e6
    found = peak(tmp_path / "checkpoint", tmp_path / "model", "bf16")
    assert found["after"] - found["before"] < allowed(1024) < 0.3 * n_bytes


def test_choosing_codes_takes_the_memory_of_a_few_million_weights(tmp_path: Path) -> None:
    shape = {"hidden_size": 1024, "intermediate_size": 1088, "num_local_experts": 1}
    shape |= {"num_experts_per_tok": 1, "num_hidden_layers": 1, "head_dim": 16}
    write_wide_mixtral(tmp_path / "checkpoint", **shape)
    found = peak(tmp_path / "checkpoint", tmp_path / "model", "trellis")
    assert found["after"] - found["before"] < allowed(1088) + CODING_BYTES


@pytest.mark.campaign
@pytest.mark.parametrize("format", ["bf16", "trellis"])
def test_eight_gigabytes_are_converted_in_two(tmp_path: Path, format: str) -> None:
    """bf16: two minutes and 16 GB of disk. trellis: 4 G weights, some minutes on two cores."""
    shape = {"hidden_size": 4096, "intermediate_size": 4096}
    shape |= {"num_local_experts": 8, "num_hidden_layers": 10}
    n_bytes = write_wide_mixtral(tmp_path / "checkpoint", **shape)
    assert n_bytes > 8e9
    found = peak(tmp_path / "checkpoint", tmp_path / "model", format)
    assert found["after"] < 2e9
    assert found["after"] - found["before"] < allowed(4096) + CODING_BYTES
