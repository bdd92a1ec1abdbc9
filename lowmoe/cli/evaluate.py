"""`lowmoe eval`.

Knows:        which text, which two models.
Ignorant of:  the measures.
"""

from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import lowmoe
from lowmoe.api import Model
from lowmoe.cli.render import TerminalReporter, out, print_json
from lowmoe.cli.run import load_model
from lowmoe.engine.evaluate import Evaluation, evaluate
from lowmoe.engine.load_options import LoadOptions
from lowmoe.engine.memory import available_ram_bytes, ram_budget
from lowmoe.engine.statistics import coarse_rate, hit_rate
from lowmoe.errors import CheckpointError, LowMoeError, UsageError
from lowmoe.experts.ledger import Traffic
from lowmoe.library.names import LocalCheckpoint, locate
from lowmoe.settings import read_settings

WINDOW = 512  # tokens, unless more or less is asked for


def read_text(file: Path) -> str:
    """A file that a user gives.  Raises UsageError."""
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"{file}: cannot be read as UTF-8 text ({e}).") from e


def evaluate_command(
    name: str,
    file: Path,
    against: Path | None,
    window: int | None,
    options: LoadOptions,
    *,
    token_by_token: bool,
    json: bool,
) -> None:
    """Print perplexity, where experts were found, and with a checkpoint divergence and agreement.

    Every window begins with what the tokenizer puts in front of a text, if anything.
    """
    text = read_text(file)
    if window is not None and window < 2:
        raise UsageError(f"--window is {window}, but must be at least 2.")
    if against is not None:  # two models: a half for each
        ram = available_ram_bytes() if options.ram is None else ram_budget(options.ram)
        options = replace(options, ram=max(1, ram // 2))
    with ExitStack() as stack:
        model = stack.enter_context(load_model(name, options))
        reference = None if against is None else stack.enter_context(_reference(against, options))
        if reference is not None and reference.runtime.spec.n_vocab != model.runtime.spec.n_vocab:
            raise CheckpointError(
                f"{against}: has a vocabulary of {reference.runtime.spec.n_vocab}, but {name} one "
                f"of {model.runtime.spec.n_vocab}. They are different models."
            )
        if token_by_token and model.session is not None:
            model.session.batch.chunk_tokens = 1
        n_context = model.runtime.n_context
        if window is not None and window > n_context:
            raise UsageError(
                f"--window is {window} tokens, but {name} is read with a context of {n_context}."
            )
        ids = model.runtime.text.tokenizer.encode(text, add_special=False)
        report = stack.enter_context(TerminalReporter())
        result = evaluate(
            model.logits,
            ids,
            window=window or min(WINDOW, n_context),
            prefix=model.runtime.text.tokenizer.prefix,
            reference=None if reference is None else reference.logits,
            progress=lambda done, total: report.step("evaluate", done, total, "windows"),
        )
        traffic, trades = model.runtime.store.traffic(), model.runtime.trades
    _show(result, traffic, trades, json=json)


def _reference(path: Path, options: LoadOptions) -> Model:
    try:
        is_checkpoint = isinstance(locate(str(path), read_settings()), LocalCheckpoint)
    except LowMoeError:
        is_checkpoint = False
    if not is_checkpoint:
        raise UsageError(
            f"--against is {path}, but must be the folder or GGUF file of an unquantized "
            "checkpoint on this disk."
        )
    return lowmoe.load(
        path,
        dtype="float32",
        gpu="none",
        ram=options.ram,
        threads=options.threads,
        context=options.context,
    )


def _show(result: Evaluation, traffic: Traffic, trades: tuple[str, ...], *, json: bool) -> None:
    values = {
        "perplexity": result.perplexity,
        "kl": result.kl,
        "top1": result.top1,
        "tokens": result.tokens,
        "hit_rate": asdict(hit_rate(traffic)),
        "coarse_rate": coarse_rate(traffic),
        "disk_bytes": traffic.disk_bytes,
        "trades": trades,
    }
    if json:
        print_json(values)
        return
    traded = "".join(f", {trade}" for trade in trades)
    out.print(f"perplexity {result.perplexity:.3f} over {result.tokens} tokens{traded}")
    if result.kl is not None and result.top1 is not None:
        out.print(f"KL divergence {result.kl:.5f} nats a token, same top token {result.top1:.2%}")
