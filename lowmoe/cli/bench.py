"""`lowmoe bench`.

Knows:        what is measured, where synthetic models are kept.
Ignorant of:  how it is measured.
"""

import json as json_module
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowmoe.checkpoint.layout import Recipe
from lowmoe.checkpoint.manifest import read_manifest
from lowmoe.checkpoint.reader import read_json
from lowmoe.cli.render import TerminalReporter, out, print_json, size, statistics_line
from lowmoe.cli.run import load_model, traced
from lowmoe.engine.bench import BenchOptions, BenchResult, bench
from lowmoe.engine.load_options import LoadOptions
from lowmoe.engine.machine import machine_line
from lowmoe.engine.profile import require_native
from lowmoe.engine.runtime import Runtime
from lowmoe.errors import UnknownModelError, UsageError
from lowmoe.families import read_config
from lowmoe.families.aliases import ALIASES, DEMO, hint_of
from lowmoe.families.fewer_layers import with_layers
from lowmoe.library.names import demo_folder, models_home
from lowmoe.loader.synthetic import write_synthetic
from lowmoe.settings import read_settings
from quant.layout import SYMBOL_BITS


def bench_command(
    name: str,
    options: BenchOptions,
    load: LoadOptions,
    *,
    synthetic: bool,
    json: bool,
    layers: int | None = None,
    timeline: Path | None = None,
) -> None:
    """Print the machine, the medians and what the machine allows.

    layers: of a synthetic model, if not all.
    """
    for field in ("runs", "prompt_tokens", "new_tokens"):
        value = getattr(options, field)
        if value < 1:
            raise UsageError(f"--{field.replace('_', '-')} is {value}, but must be at least 1.")
    if options.profile and load.sequences > 1:
        raise UsageError(
            f"--profile shows a token of one sequence, but --sequences is {load.sequences}. "
            "Leave one of them out."
        )
    if layers is not None and not synthetic:
        raise UsageError(
            f"--layers {layers} cuts a shape, and needs --synthetic. Give both or neither."
        )
    if synthetic:
        name = str(_synthetic(name, load, layers))
    with traced(load, timeline) as traced_load, load_model(name, traced_load) as model:
        if options.profile:
            require_native(model.runtime)
        if not json:
            out.print(_machine(model.runtime), style="dim", markup=False, soft_wrap=True)
        with TerminalReporter() as report:
            result = bench(model.runtime, options, lambda d, t: report.step("bench", d, t, "runs"))
        _show(result, _machine(model.runtime), json=json)


def _synthetic(name: str, load: LoadOptions, layers: int | None) -> Path:
    """The folder of random codes of that shape, written now if it is not there."""
    title, config = _shape(name)
    if layers is not None:
        title, config = f"{title}-{layers}layers", with_layers(config, layers)
    family = read_config(config)
    if not family.spec.n_experts_total:
        raise UsageError(
            f"--layers is {layers}, but the first {layers} layers of {name} have no experts. "
            "Give more."
        )
    bits = 4 if load.bits == "auto" else int(load.bits)
    folder = models_home(read_settings()) / f"synthetic-{title}-{bits}bit"
    recipe = Recipe(expert_planes=bits // SYMBOL_BITS)
    with TerminalReporter() as report:
        write_synthetic(
            folder,
            config,
            family,
            recipe,
            name=f"synthetic {title}",
            progress=lambda done, total: report.step("write", done, total, "spans"),
        )
    return folder


def _shape(name: str) -> tuple[str, Mapping[str, Any]]:
    if name in ALIASES:
        return name, ALIASES[name].config
    if name == DEMO:
        return name, read_manifest(demo_folder()).config
    path = Path(name)
    if path.is_file():
        config = read_json(path)
        digest = json_module.dumps(config, sort_keys=True)
        return f"{path.resolve().parent.name}-{_short_hash(digest)}", config
    raise UnknownModelError(f"{name!r} is no alias and no config.json. {hint_of(name)}")


def _short_hash(text: str) -> str:
    import xxhash

    return xxhash.xxh3_64_hexdigest(text.encode())[:8]


def _machine(runtime: Runtime) -> str:
    """This machine, and the GPU if it computes."""
    gpu = "" if runtime.gpu is None else f", {runtime.gpu.name} ({size(runtime.gpu.memory_bytes)})"
    return machine_line() + gpu


def _show(result: BenchResult, machine: str, *, json: bool) -> None:
    if json:
        print_json({"machine": machine, **result.to_json()})
        return
    for sample in result.samples:
        out.print(statistics_line(sample), markup=False, soft_wrap=True)
    medians = result.to_json()
    out.print(
        f"median: prefill {medians['prefill_tokens_per_s']:.3g} tokens/s, decode "
        f"{medians['decode_tokens_per_s'] or 0:.3g} tokens/s, bound "
        f"{medians['bound_tokens_per_s'] or 0:.3g}"
    )
    if result.sequences > 1:
        in_all = medians["decode_tokens_per_s_in_all"]
        out.print(
            f"{result.sequences} together: decode {in_all or 0:.3g} tokens/s in all", markup=False
        )
    if result.gpu_ceiling_bytes_per_s is not None:
        out.print(f"GPU copies: {size(result.gpu_ceiling_bytes_per_s)}/s measured here")
    out.print(f"RAM reads: {size(result.ram_ceiling_bytes_per_s)}/s measured here")
    if result.disk_ceiling_bytes_per_s is not None:
        out.print(f"disk, plain reads of the same sizes: {size(result.disk_ceiling_bytes_per_s)}/s")
    if result.disk_read_bytes_per_s is not None:
        out.print(f"disk, while decoding: {size(result.disk_read_bytes_per_s)}/s")
    if result.profile is not None:
        _show_phases("a token of the prompt", result.profile.prefill)
        if result.profile.decode is not None:
            _show_phases("a generated token", result.profile.decode)


def _show_phases(what: str, phases: Mapping[str, float]) -> None:
    whole = sum(phases.values())
    out.print(f"{what}: {whole * 1e3:.3f} ms")
    for name, seconds in phases.items():
        out.print(f"  {name:40} {seconds * 1e6:9.1f} us  {seconds / whole:6.1%}")
