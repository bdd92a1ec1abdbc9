"""The commands and their options.

Knows:        typer, which command calls what, exit codes.
Ignorant of:  everything else; torch is imported inside the commands, so that --help is instant.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowmoe.cli.options import (
    Bits,
    CacheAwareRouting,
    Calibration,
    Context,
    DiskSpeed,
    FolderHere,
    Format,
    Gpu,
    HideThinking,
    Json,
    Kv,
    MakeBits,
    Misses,
    MissPlanes,
    Model,
    ModelHere,
    NoCalibration,
    OptionalModel,
    PlannedRam,
    Ram,
    RamSpeed,
    Threads,
    TraceTimeline,
    Vram,
)
from lowmoe.errors import LowMoeError

if TYPE_CHECKING:
    from lowmoe.library.options import MakeOptions

app = typer.Typer(
    name="lowmoe",
    help="Run Mixture-of-Experts models of 100B+ parameters on one PC.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


@app.command()
def run(
    model: OptionalModel = "demo",
    prompt: Annotated[
        str | None, typer.Option(help="Text to go on with. Without it: a chat, in a terminal.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Take --prompt as a chat message.")] = False,
    system: Annotated[str | None, typer.Option(help="The chat's system message.")] = None,
    gpu: Gpu = "auto",
    bits: Bits = "auto",
    ram: Ram = None,
    vram: Vram = None,
    threads: Threads = None,
    context: Context = None,
    kv: Kv = None,
    misses: Misses = "auto",
    cache_aware_routing: CacheAwareRouting = None,
    miss_planes: MissPlanes = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Choose among so many tokens; 0: all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Choose among this much probability.")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Drop tokens below this share of the likeliest.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1 discourages repeating.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes answers repeatable.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends an answer; may be given several times.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer, in tokens.")] = None,
    hide_thinking: HideThinking = False,
    trace_timeline: TraceTimeline = None,
    json: Json = False,
) -> None:
    """Chat with a model, or let it go on with a text; pulls and quantizes on first use."""
    _begin_early_reads(model)
    from lowmoe.cli.run import Asked, Generating, run_model
    from lowmoe.engine.load_options import LoadOptions

    run_model(
        model,
        Asked(
            prompt=prompt,
            chat=chat or system is not None,
            system=system,
            json=json,
            hide_thinking=hide_thinking,
            timeline=trace_timeline,
        ),
        LoadOptions(
            gpu=gpu,
            bits=_bits_of(bits),
            ram=ram,
            vram=vram,
            threads=threads,
            context=context,
            kv=kv,
            misses=misses,
            cache_aware_routing=cache_aware_routing,
            miss_planes=miss_planes,
        ),
        Generating(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
            max_new_tokens=max_new_tokens,
        ),
    )


def _begin_early_reads(model: str) -> None:
    """Before the first import of torch."""
    from lowmoe.library.early_reads import begin_early_reads
    from lowmoe.settings import read_settings

    begin_early_reads(model, read_settings())


def _bits_of(text: str) -> int | str:
    """As a number where it is one of those there are; other words are refused by who is told."""
    return int(text) if text in ("2", "4", "6") else text


def _make_options(
    bits: int | str,
    format: str,
    calibration: Path | None,
    no_calibration: bool,
    threads: int | None,
) -> "MakeOptions":
    from lowmoe.errors import UsageError
    from lowmoe.library.options import MakeOptions

    if isinstance(bits, str):
        raise UsageError(f"--bits is {bits!r}, but must be 2, 4, 6 or auto.")
    return MakeOptions(
        bits=bits,
        format=format,
        calibration=calibration,
        calibrate=not no_calibration,
        threads=threads,
    )


@app.command()
def serve(
    model: OptionalModel = "demo",
    host: Annotated[
        str, typer.Option(help="The address to listen on; any but this machine's needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen on; 0 takes a free one.")] = 8080,
    api_key: Annotated[
        str | None, typer.Option(help="What clients must send. Default: LOWMOE_API_KEY.")
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="A name by which clients may call; may be given several times."),
    ] = None,
    sequences: Annotated[
        int | None,
        typer.Option(
            help="Answers decoded together, each with a cache of its own. Default: 8, or what an "
            "eighth of the memory holds."
        ),
    ] = None,
    queue: Annotated[
        int, typer.Option(help="Requests that may wait for their turn; more are refused.")
    ] = 64,
    gpu: Gpu = "auto",
    bits: Bits = "auto",
    ram: Ram = None,
    vram: Vram = None,
    threads: Threads = None,
    context: Context = None,
    kv: Kv = None,
    misses: Misses = "auto",
    cache_aware_routing: CacheAwareRouting = None,
    miss_planes: MissPlanes = None,
    trace_timeline: TraceTimeline = None,
) -> None:
    """Answer programs that speak OpenAI's or Anthropic's API; Ctrl-C ends it."""
    _begin_early_reads(model)
    from lowmoe.cli.serve import Asked, serve_command
    from lowmoe.engine.load_options import LoadOptions

    serve_command(
        model,
        Asked(
            host=host,
            port=port,
            api_key=api_key,
            allow_hosts=tuple(allow_host or ()),
            sequences=sequences,
            n_waiting=queue,
            timeline=trace_timeline,
        ),
        LoadOptions(
            gpu=gpu,
            bits=_bits_of(bits),
            ram=ram,
            vram=vram,
            threads=threads,
            context=context,
            kv=kv,
            misses=misses,
            cache_aware_routing=cache_aware_routing,
            miss_planes=miss_planes,
            sequences=1 if sequences is None else sequences,
        ),
    )


@app.command()
def launch(
    client: Annotated[
        str | None, typer.Argument(help="Which program or library; without: says which there are.")
    ] = None,
    command: Annotated[
        list[str] | None, typer.Argument(help="A command of your own, after --, to run instead.")
    ] = None,
    url: Annotated[
        str, typer.Option(help="Where `lowmoe serve` answers.")
    ] = "http://127.0.0.1:8080",
    model: Annotated[
        str | None, typer.Option(help="The model's name. Default: the server is asked.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(help="The server's key. Default: LOWMOE_API_KEY.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be done, for a shell.")
    ] = False,
    json: Json = False,
) -> None:
    """Start a program of others, say a coding agent, that asks this server and nobody else."""
    from lowmoe.cli.launch import Asked, launch_command

    code = launch_command(
        Asked(
            client=client,
            url=url,
            model=model,
            api_key=api_key,
            command=tuple(command or ()),
            dry_run=dry_run,
            json=json,
        )
    )
    if code:
        raise typer.Exit(code)


@app.command()
def quantize(
    source: Annotated[Path, typer.Argument(help="A checkpoint folder or a GGUF file.")],
    folder: Annotated[Path, typer.Argument(help="The model folder to make or go on with.")],
    bits: MakeBits = 4,
    format: Format = "trellis",
    calibration: Calibration = None,
    no_calibration: NoCalibration = False,
    threads: Threads = None,
) -> None:
    """Make a model folder from a checkpoint on disk; an interrupted run goes on."""
    from lowmoe.cli.make import quantize_command

    options = _make_options(bits, format, calibration, no_calibration, threads)
    quantize_command(source, folder, options)


@app.command()
def pull(
    model: Annotated[
        str, typer.Argument(help="An alias or a hub repository: owner/name, owner/name:Q8_0.")
    ],
    bits: Annotated[
        str, typer.Option(help="Bits a weight of experts: 2, 4, 6, or auto: what runs best here.")
    ] = "auto",
    format: Format = "trellis",
    calibration: Calibration = None,
    no_calibration: NoCalibration = False,
    threads: Threads = None,
) -> None:
    """Download shard by shard, verify, quantize, delete the shard; an interrupted run goes on."""
    from lowmoe.cli.make import advised_bits, pull_command

    number = advised_bits(model, format) if bits == "auto" else _bits_of(bits)
    options = _make_options(number, format, calibration, no_calibration, threads)
    pull_command(model, options)


@app.command()
def bench(
    model: OptionalModel = "demo",
    synthetic: Annotated[
        bool,
        typer.Option(
            "--synthetic",
            help="Random weights of that model's shape (an alias or a config.json): no download.",
        ),
    ] = False,
    layers: Annotated[
        int | None, typer.Option(help="With --synthetic: the first so many layers of that shape.")
    ] = None,
    gpu: Gpu = "auto",
    bits: Bits = "auto",
    ram: Ram = None,
    vram: Vram = None,
    threads: Threads = None,
    context: Context = None,
    kv: Kv = None,
    misses: Misses = "auto",
    sequences: Annotated[
        int, typer.Option(help="Prompts decoded together, each with a cache of its own.")
    ] = 1,
    cache_aware_routing: CacheAwareRouting = None,
    miss_planes: MissPlanes = None,
    runs: Annotated[int, typer.Option(help="Counted runs; one more warms up.")] = 3,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of prefill in each run.")] = 64,
    new_tokens: Annotated[int, typer.Option(help="Tokens of decode in each run.")] = 32,
    profile: Annotated[
        bool, typer.Option("--profile", help="Show where a token's time goes, part by part.")
    ] = False,
    trace_timeline: TraceTimeline = None,
    json: Json = False,
) -> None:
    """Measure tokens/s of prefill and decode beside what the machine allows."""
    from lowmoe.cli.bench import bench_command
    from lowmoe.engine.bench import BenchOptions
    from lowmoe.engine.load_options import LoadOptions

    options = BenchOptions(
        runs=runs, prompt_tokens=prompt_tokens, new_tokens=new_tokens, profile=profile
    )
    load = LoadOptions(
        gpu=gpu,
        bits=_bits_of(bits),
        ram=ram,
        vram=vram,
        threads=threads,
        context=context,
        kv=kv,
        misses=misses,
        cache_aware_routing=cache_aware_routing,
        miss_planes=miss_planes,
        sequences=sequences,
    )
    bench_command(
        model,
        options,
        load,
        synthetic=synthetic,
        json=json,
        layers=layers,
        timeline=trace_timeline,
    )


@app.command(name="plan")
def plan_(
    model: Annotated[
        str | None,
        typer.Argument(
            help="An alias, a hub repository, a model folder, a checkpoint, a GGUF file, a "
            "config.json or its address."
        ),
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every model with an alias.")] = False,
    gpu: Gpu = "auto",
    bits: Bits = "auto",
    ram: PlannedRam = None,
    vram: Vram = None,
    disk: DiskSpeed = None,
    ram_speed: RamSpeed = None,
    threads: Threads = None,
    context: Context = None,
    kv: Kv = None,
    misses: Misses = "auto",
    sequences: Annotated[
        int, typer.Option(help="Conversations that have room, each with a cache of its own.")
    ] = 1,
    plot: Annotated[
        Path | None, typer.Option(help="A picture to write: tokens/s against VRAM and RAM.")
    ] = None,
    json: Json = False,
) -> None:
    """Will it run, at which width, how fast: before a byte is downloaded."""
    from lowmoe.cli.plan import Asked, plan_all_command, plan_command
    from lowmoe.engine.load_options import LoadOptions
    from lowmoe.errors import UsageError
    from lowmoe.plan.here import Described

    # Refuses bits, a context or a format of the cache that cannot be; a card need not be here.
    options = LoadOptions(
        gpu="none",
        bits=_bits_of(bits),
        ram=ram,
        threads=threads,
        context=context,
        kv=kv,
        misses=misses,
        sequences=sequences,
    )
    asked = Asked(
        machine=Described(
            gpu=gpu, ram=ram, vram=vram, disk=disk, ram_speed=ram_speed, threads=threads
        ),
        bits=bits,
        context=context,
        kv=kv,
        sequences=sequences,
        misses=options.misses_kind,
        plot=plot,
        json=json,
    )
    if all_ == (model is not None) or (all_ and plot is not None):
        raise UsageError("plan takes a model, or --all without --plot. Give one of them.")
    if model is None:
        plan_all_command(asked)
    else:
        plan_command(model, asked)


@app.command()
def trace(
    model: Annotated[
        str, typer.Argument(help="A model; or with --synthetic, one of a few shapes.")
    ],
    file: Annotated[Path | None, typer.Argument(help="A text file.")] = None,
    out: Annotated[Path, typer.Option(help="The trace to write.")] = Path("trace.npz"),
    tokens: Annotated[int, typer.Option(help="Tokens at most.")] = 4096,
    synthetic: Annotated[
        bool, typer.Option("--synthetic", help="Drawn from what is published of a model's routing.")
    ] = False,
    ram: Ram = None,
    threads: Threads = None,
) -> None:
    """Record which experts the tokens of a text go to."""
    from lowmoe.cli.simulate import trace_command
    from lowmoe.engine.load_options import LoadOptions

    load = LoadOptions(gpu="none", ram=ram, threads=threads)
    trace_command(model, file, out, tokens, load, synthetic=synthetic)


@app.command()
def simulate(
    trace: Annotated[Path, typer.Argument(help="What `lowmoe trace` wrote.")],
    policy: Annotated[
        str, typer.Option(help="decayed, lru, static, belady, or all of them.")
    ] = "all",
    gpu: Gpu = "auto",
    bits: Annotated[int, typer.Option(help="Bits a weight of experts: 2, 4 or 6.")] = 4,
    ram: PlannedRam = None,
    vram: Vram = None,
    disk: DiskSpeed = None,
    ram_speed: RamSpeed = None,
    threads: Threads = None,
    context: Context = None,
    kv: Kv = None,
    plot: Annotated[
        Path | None, typer.Option(help="A picture to write: hit rate against slots.")
    ] = None,
    json: Json = False,
) -> None:
    """Replay a trace through the tiers of a machine: hit rates and tokens/s by policy."""
    from lowmoe.cli.simulate import Asked, simulate_command
    from lowmoe.engine.load_options import LoadOptions
    from lowmoe.plan.here import Described

    # Refuses what cannot be; a card need not be here.
    LoadOptions(gpu="none", ram=ram, threads=threads, context=context, kv=kv)
    asked = Asked(
        machine=Described(
            gpu=gpu, ram=ram, vram=vram, disk=disk, ram_speed=ram_speed, threads=threads
        ),
        policy=policy,
        bits=bits,
        context=context,
        kv=kv,
        plot=plot,
        json=json,
    )
    simulate_command(trace, asked)


@app.command()
def optimize(
    model: Annotated[
        str, typer.Argument(help="A model folder, or the name of a model that is here.")
    ],
    trace: Annotated[Path, typer.Option(help="What `lowmoe trace` wrote of this model.")],
) -> None:
    """Let a model begin with the experts that a trace used most."""
    from lowmoe.cli.simulate import optimize_command

    optimize_command(model, trace)


@app.command(name="eval")
def evaluate(
    model: Model,
    file: Annotated[Path, typer.Argument(help="A text file.")],
    against: Annotated[
        Path | None,
        typer.Option(help="The unquantized checkpoint: adds KL divergence and top-1 agreement."),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            help="Tokens a window; windows share nothing.", show_default="512, or the context"
        ),
    ] = None,
    token_by_token: Annotated[
        bool,
        typer.Option(
            "--token-by-token",
            help="As decoding does it: slower, and with less RAM than experts another hit rate.",
        ),
    ] = False,
    gpu: Gpu = "auto",
    bits: Bits = "auto",
    ram: Ram = None,
    vram: Vram = None,
    threads: Threads = None,
    kv: Kv = None,
    misses: Misses = "auto",
    cache_aware_routing: CacheAwareRouting = None,
    miss_planes: MissPlanes = None,
    json: Json = False,
) -> None:
    """Perplexity of a text, and how far quantization has moved the model."""
    from lowmoe.cli.evaluate import evaluate_command
    from lowmoe.engine.load_options import LoadOptions

    load = LoadOptions(
        gpu=gpu,
        bits=_bits_of(bits),
        ram=ram,
        vram=vram,
        threads=threads,
        kv=kv,
        misses=misses,
        cache_aware_routing=cache_aware_routing,
        miss_planes=miss_planes,
    )
    evaluate_command(model, file, against, window, load, token_by_token=token_by_token, json=json)


@app.command()
def inspect(model: ModelHere = "demo", json: Json = False) -> None:
    """What a model folder, a checkpoint or a GGUF file holds."""
    from lowmoe.cli.manage import inspect_command

    inspect_command(model, json=json)


@app.command()
def verify(model: FolderHere = "demo") -> None:
    """Check every byte of a model folder against its hash."""
    from lowmoe.cli.manage import verify_command

    verify_command(model)


@app.command(name="list")
def list_(
    aliases: Annotated[
        bool, typer.Option("--aliases", help="What can be pulled by a short name, instead.")
    ] = False,
    json: Json = False,
) -> None:
    """The models on this machine."""
    from lowmoe.cli.manage import list_aliases_command, list_command

    if aliases:
        list_aliases_command(json=json)
    else:
        list_command(json=json)


@app.command()
def rm(
    name: Annotated[str, typer.Argument(help="A name that `lowmoe list` shows.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete a model of this machine."""
    from lowmoe.cli.manage import rm_command

    rm_command(name, yes=yes)


@app.command()
def doctor(json: Json = False) -> None:
    """What this machine offers, and what is missing."""
    from lowmoe.cli.manage import doctor_command

    doctor_command(json=json)


def main() -> None:
    """The entry point: one line on stderr for what the world did wrong, a traceback for bugs.

    typer itself answers bad usage (2) and Ctrl-C (130).
    """
    try:
        app(prog_name="lowmoe")
    except LowMoeError as e:
        print("lowmoe:", " ".join(str(e).splitlines()), file=sys.stderr)
        sys.exit(e.exit_code)
