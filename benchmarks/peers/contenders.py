"""Both sides' models of one shape, made where they are missing, and the commands that time them.

Knows:        which formats compete at how many bits, where models are kept.
Ignorant of:  rounds, results.
"""

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.peers.evenness import describe
from benchmarks.peers.lowmoe_folder import folder_bytes, synthetic_folder
from benchmarks.peers.processes import last_line
from benchmarks.peers.shapes import SHAPES, Shape
from benchmarks.peers.turns import Contender

# llama.cpp's formats of about that many bits, and whether repacking changes their experts.
PRESETS = {4: {"Q4_0": True, "Q4_K_M": True}, 2: {"Q2_K": True, "IQ2_XS": False}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What every contender does.  measure: "prefill" or "decode"; tokens: of a sample."""

    measure: str
    tokens: int
    threads: int
    samples: int
    warm_ups: int

    def options(self) -> list[str]:
        """samples.add_sample_arguments' options."""
        return [
            f"--measure={self.measure}",
            f"--tokens={self.tokens}",
            f"--threads={self.threads}",
            f"--samples={self.samples}",
            f"--warm-ups={self.warm_ups}",
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """One shape's models in a folder.

    peer_python: of the virtual environment that llama.cpp was installed into; n_layers: None for
    all that the shape has.
    """

    work: Path
    shape_name: str
    peer_python: Path
    n_layers: int | None = None
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def shape(self) -> Shape:
        shape = SHAPES[self.shape_name]
        return shape if self.n_layers is None else replace(shape, n_layers=self.n_layers)

    @property
    def _name(self) -> str:
        layers = "" if self.n_layers is None else f"-{self.n_layers}layers"
        return self.shape_name + layers

    def lowmoe(
        self, bits: int, workload: Workload, *, ram: str | None = None, cold: bool = False
    ) -> Contender:
        """lowmoe with experts of so many bits.  cold: the page cache forgets the model first."""
        folder = synthetic_folder(self.work, self._name, self.shape, bits)
        self._check_folder(folder, ram)
        return Contender(
            name=f"lowmoe {bits} bits",
            side="lowmoe",
            bits=bits,
            command=[
                *(sys.executable, "-m", "benchmarks.peers.lowmoe_timing", str(folder)),
                *(f"--bits={bits}", *([] if ram is None else [f"--ram={ram}"])),
                *workload.options(),
            ],
            environment=self.environment,
            cold_files=sorted(folder.glob("*.safetensors")) if cold else (),
        )

    def llama_cpp(self, bits: int, workload: Workload) -> list[Contender]:
        """Every setting of llama.cpp that may be its fastest at about so many bits."""
        return [
            self._peer(preset, bits, workload, repack=repack)
            for preset, repacks in PRESETS[bits].items()
            for repack in ([True, False] if repacks else [True])
        ]

    def larger_than_ram(self, preset: str, bits: int, workload: Workload) -> Contender:
        """llama.cpp with the file mapped, the page cache its only cache, cold."""
        contender = self._peer(preset, bits, workload, repack=False, load_mode="mmap")
        return replace(contender, cold_files=(self._file(preset),))

    def _peer(
        self, preset: str, bits: int, workload: Workload, *, repack: bool, load_mode: str = "read"
    ) -> Contender:
        file = self._file(preset)
        return Contender(
            name=f"llama.cpp {preset}" + ("" if repack else ", not repacked"),
            side="llama.cpp",
            bits=bits,
            command=[
                *(str(self.peer_python), "-m", "benchmarks.peers.llama_cpp_timing", str(file)),
                *(f"--load-mode={load_mode}", *([] if repack else ["--no-repack"])),
                *workload.options(),
            ],
        )

    def n_bytes(self, preset: str, bits: int) -> tuple[int, int]:
        """What llama.cpp's file and lowmoe's folder take on disk, whether they are there or not."""
        plan = self._gguf(preset, Path("none"), "--plan")
        return int(plan["n_bytes"]), folder_bytes(self.shape, bits)

    def peer_info(self) -> str:
        """Which instructions llama.cpp says it was built for."""
        return str(self._peer_json("benchmarks.peers.llama_cpp_model")["system_info"])

    def _check_folder(self, folder: Path, ram: str | None) -> None:
        """Hold the routing of a folder against what makes sense, once."""
        passed = folder.with_name(folder.name + ".routing.json")
        if passed.exists():
            return
        budget = [] if ram is None else [f"--ram={ram}"]
        line = last_line(
            [sys.executable, "-m", "benchmarks.peers.lowmoe_routing", str(folder), *budget]
        )
        print(f"  {folder.name}: {describe(json.loads(line))}", flush=True)
        passed.write_text(line, "utf-8")

    def _file(self, preset: str) -> Path:
        """A GGUF file whose routing was checked when it was made."""
        file = self.work / f"{self._name}-{preset}.gguf"
        if not file.exists():
            print(f"writing {file.name}", flush=True)
            unchecked = file.with_suffix(".unchecked")
            self._gguf(preset, unchecked)
            evenness = self._peer_json("benchmarks.peers.llama_cpp_routing", str(unchecked))
            unchecked.rename(file)
            print(f"  {file.name}: {describe(evenness)}", flush=True)
        return file

    def _gguf(self, preset: str, file: Path, *options: str) -> Any:
        layers = [] if self.n_layers is None else [f"--layers={self.n_layers}"]
        return self._peer_json(
            "benchmarks.peers.gguf_file", self.shape_name, preset, str(file), *layers, *options
        )

    def _peer_json(self, module: str, *arguments: str) -> Any:
        line = last_line([str(self.peer_python), "-m", module, *arguments])
        return json.loads(line)
