"""`lowmoe list`, `inspect`, `verify`, `rm` and `doctor`.

Knows:        what users want to see of models and machines.
Ignorant of:  running models.
"""

import importlib.metadata
import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cuda_ext import card
from lowmoe.checkpoint import files
from lowmoe.checkpoint.folder import ModelFolder
from lowmoe.cli.render import TerminalReporter, billions, err, out, print_json, size
from lowmoe.decoder.open_checkpoint import open_checkpoint
from lowmoe.engine.load_options import TORCH
from lowmoe.engine.machine import machine_line, new_pool
from lowmoe.engine.memory import available_ram_bytes, total_ram_bytes
from lowmoe.engine.template_file import template_file
from lowmoe.errors import FolderError, UsageError
from lowmoe.families import read_config
from lowmoe.families.aliases import ALIASES
from lowmoe.families.licences import LICENCES
from lowmoe.kernels import cpu
from lowmoe.library.names import (
    HubModel,
    LocalFolder,
    demo_folder,
    find_installed,
    installed,
    locate,
    models_home,
    remove,
)
from lowmoe.library.verify import verify
from lowmoe.plan.here import measured_again
from lowmoe.plan.memo import Memo
from lowmoe.plan.shortfall import reasons
from lowmoe.settings import read_settings
from lowmoe.spec import (
    Attention,
    GatedDeltaNet,
    LatentAttention,
    LightningAttention,
    ModelSpec,
)


def list_command(*, json: bool) -> None:
    """Models of the home, the demo, aliases that can be pulled."""
    settings = read_settings()
    models = installed(settings)
    if json:
        print_json(
            {
                "home": str(models_home(settings)),
                "models": [
                    {"name": m.name, "bytes": m.n_bytes, "finished": m.finished} for m in models
                ],
            }
        )
        return
    total = sum(f.stat().st_size for f in demo_folder().iterdir())
    out.print(f"{'demo':40} {size(total):>9}  comes with lowmoe")
    for model in models:
        note = "" if model.finished else "  unfinished: run the same command again to go on"
        out.print(f"{model.name:40} {size(model.n_bytes):>9}{note}", markup=False, soft_wrap=True)
    out.print(f"in {models_home(settings)}", style="dim", markup=False, soft_wrap=True)
    out.print(
        f"aliases to pull (sizes, licences: --aliases): {', '.join(ALIASES)}",
        style="dim",
        soft_wrap=True,
    )


def list_aliases_command(*, json: bool) -> None:
    """What aliases stand for, and how large it is."""
    specs = {name: read_config(alias.config).spec for name, alias in ALIASES.items()}
    if json:
        rows = [
            {
                "name": name,
                "repository": alias.repository,
                "licence": alias.licence,
                "chats": alias.chats,
                "parameters": specs[name].n_parameters,
                "active_parameters": specs[name].n_active_parameters,
            }
            for name, alias in ALIASES.items()
        ]
        print_json({"aliases": rows})
        return
    width = max(map(len, ALIASES))
    of_licences = max(len(alias.licence or "") for alias in ALIASES.values())
    for name, alias in ALIASES.items():
        spec = specs[name]
        sizes = f"{billions(spec.n_parameters)}, {billions(spec.n_active_parameters)} active"
        does = "chats" if alias.chats else "continues"
        licence = f"{alias.licence or '-':{of_licences}}"
        out.print(
            f"{name:{width}} {sizes:22} {does:9} {licence}  {alias.repository}",
            markup=False,
            soft_wrap=True,
        )


def inspect_command(name: str, *, json: bool) -> None:
    """What a folder or a checkpoint holds."""
    located = locate(name, read_settings())
    if isinstance(located, HubModel):
        raise UsageError(f"{name}: is not on this disk. Pull it first: lowmoe pull {name}.")
    if isinstance(located, LocalFolder):
        with ModelFolder(located.path) as folder:
            values = {**_shape(read_config(folder.manifest.config).spec), **_contents(folder)}
    else:
        checkpoint = open_checkpoint(located.path)
        values = {
            **_shape(checkpoint.family.spec),
            "path": str(located.path),
            "format": checkpoint.form,
            "chat_template": template_file(checkpoint.small_file),
            "tensors": len(checkpoint.files.names()),
        }
    if json:
        print_json(values)
        return
    for key, value in values.items():
        if value is None:
            continue
        out.print(f"{key.replace('_', ' '):20} {_shown(key, value)}", markup=False, soft_wrap=True)


def _shown(key: str, value: Any) -> str:
    if key == "bytes":
        return ", ".join(f"{name} {size(n)}" for name, n in value.items())
    if key in ("parameters", "active_parameters") and value >= 10**6:
        return f"{value / 1e9:.4g} billion"
    return str(value)


def _shape(spec: ModelSpec) -> Mapping[str, Any]:
    attention, experts = spec.layers[0].attention, spec.uniform_experts()
    return {
        "family": spec.model_type,
        "parameters": spec.n_parameters,
        "active_parameters": spec.n_active_parameters,
        "layers": len(spec.layers),
        "hidden": spec.n_hidden,
        "heads": _heads(attention),
        "experts": f"{experts.n_experts} of {experts.n_inner}, {experts.router.n_active} a token",
        "vocabulary": spec.n_vocab,
        "context": spec.context_length,
    }


def _heads(attention: Attention) -> str:
    if isinstance(attention, LatentAttention):
        kept = attention.kv_rank + attention.rope_size
        return f"{attention.n_heads} of {attention.key_size}, {kept} latent key-value channels"
    if isinstance(attention, GatedDeltaNet | LightningAttention):
        *_, (n_heads, rows, columns) = attention.state_shapes
        return f"{n_heads} with states of {rows} x {columns} in the first layer"
    return f"{attention.n_heads} of {attention.head_size}, {attention.n_kv_heads} key-value"


def _contents(folder: ModelFolder) -> Mapping[str, Any]:
    manifest, recipe = folder.manifest, folder.recipe
    sizes: dict[str, int] = {}
    for span in manifest.spans.values():
        sizes[span.place.file] = sizes.get(span.place.file, 0) + span.place.n_bytes
    planes = f", {recipe.expert_planes} planes" if recipe.format == "trellis" else ""
    calibration = manifest.calibration
    return {
        "path": str(folder.path),
        "format": f"{recipe.format}{planes}",
        "source": manifest.source.name + (f" @ {c}" if (c := manifest.source.commit) else ""),
        "licence": LICENCES.get(manifest.source.name),
        "chat_template": template_file(folder.small_file),
        "calibration": f"{calibration.n_tokens} tokens" if calibration else "none",
        "spans": len(manifest.spans),
        "bytes": sizes,
    }


def verify_command(name: str) -> None:
    """Check every byte."""
    located = locate(name, read_settings())
    if not isinstance(located, LocalFolder):
        raise UsageError(
            f"{name}: is no model folder here; only those have hashes of every byte. Make one: "
            "lowmoe pull, or quantize."
        )
    with ModelFolder(located.path) as folder, TerminalReporter() as report:
        verify(folder, lambda done, total: report.step("verify", done, total, "B"))
        n_spans = len(folder.manifest.spans)
    out.print(
        f"{located.path}: all {n_spans} spans are what they should be",
        markup=False,
        soft_wrap=True,
    )


def rm_command(name: str, *, yes: bool) -> None:
    """Delete a model of the home."""
    settings = read_settings()
    model = find_installed(name, settings)
    if not yes and not _confirmed(f"Delete {model.path}, {size(model.n_bytes)}? [y/N] "):
        out.print("Nothing was deleted.")
        return
    remove(model, settings)
    out.print(f"{size(model.n_bytes)} given back")


def _confirmed(question: str) -> bool:
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        raise UsageError(
            "nobody is there to answer. Give --yes to delete without asking."
        ) from None


def doctor_command(*, json: bool) -> None:
    """What this machine offers."""
    settings = read_settings()
    home, direct = settings.home, _direct_reads(settings.home)
    memo = measured_again(settings)
    pool, isa = new_pool(), settings.isa
    if isa != TORCH:
        isa = cpu.choose_isa(isa)
    values: dict[str, Any] = {
        "lowmoe": _version(),
        "python": platform.python_version(),
        "machine": machine_line(),
        "threads": pool.n_threads,
        "instruction_set": isa,
        "instruction_sets": cpu.isas(),
        "ram_bytes": total_ram_bytes(),
        "ram_available_bytes": available_ram_bytes(),
        "ram_read_bytes_per_s": memo.ram_bytes_per_s,
        "disk_read_bytes_per_s": memo.disk_bytes_per_s,
        "home": str(home),
        "disk_free_bytes": files.free_bytes(home),
        "direct_reads": direct,
        "gpu": card.in_a_line(card.look()),
        **_of_runs(memo),
    }
    if json:
        print_json(values)
        return
    for key, value in values.items():
        shown = _doctors_word(key, value)
        out.print(f"{key.replace('_', ' '):22} {shown}", markup=False, soft_wrap=True)
    if isa != cpu.isas()[0]:
        err.print(
            f"LOWMOE_ISA is {isa}, but this processor runs {cpu.isas()[0]}, which is faster. "
            "Unset it.",
            markup=False,
        )
    if cpu.isas()[0] == "scalar":
        err.print(
            "This processor has no instruction set that lowmoe has fast code for (AVX2, AVX-512, "
            "NEON with dot products); it will run many times slower than it could read memory.",
            markup=False,
        )
    if not direct:
        err.print(
            f"{home}: the file system does not allow direct reads; models larger than RAM will "
            "run through the page cache, which is slower. A local ext4, xfs or btrfs allows them.",
            markup=False,
            soft_wrap=True,
        )


def _version() -> str:
    try:
        return importlib.metadata.version("lowmoe")
    except importlib.metadata.PackageNotFoundError:  # run from a clone
        return "not installed"


def _of_runs(memo: Memo) -> dict[str, Any]:
    """How far the last runs came, and what may keep them from coming further."""
    ratio = memo.ratio if memo.runs else None
    return {
        "runs": len(memo.runs),
        "achieved_of_predicted": ratio,
        "shortfall": reasons(memo),
    }


def _doctors_word(key: str, value: Any) -> str:
    if value is None:
        return "not known"
    if key.endswith("bytes_per_s"):
        return f"{size(value)}/s"
    if isinstance(value, float):
        return f"{value:.2f}"
    if "bytes" in key:
        return size(value)
    if isinstance(value, list):
        return (" " if key == "shortfall" else ", ").join(value) or "none"
    return str(value)


def _direct_reads(home: Path) -> bool:
    """Whether files of the home can be read past the page cache."""
    files.make_folder(home)
    try:
        with tempfile.NamedTemporaryFile(dir=home) as probe:
            probe.write(b"\0" * files.ALIGNMENT)
            probe.flush()
            descriptor, direct = files.open_direct(Path(probe.name))
            files.close(descriptor)
            return direct
    except OSError as e:
        raise FolderError(
            f"{home}: writing there gave {e.strerror}. Set LOWMOE_HOME to a folder of yours."
        ) from e
