"""lowmoe for Python programs.

    with lowmoe.load("mixtral-8x22b", bits=4) as model:
        print(model.generate("Why is the sky blue?", max_new_tokens=64, temperature=0.0))

Knows:        what a caller may ask of a model.
Ignorant of:  terminals, HTTP.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from lowmoe.engine.answer import Token, check_ids
from lowmoe.engine.constraint import Constraint
from lowmoe.engine.generate import CLOSED, Session
from lowmoe.engine.load import load_checkpoint, load_folder
from lowmoe.engine.load_options import LoadOptions
from lowmoe.engine.options import SamplingArguments, SamplingOptions, sampling_options
from lowmoe.engine.report import OnceUnderWay, Reporter, SilentReporter
from lowmoe.engine.runtime import Runtime
from lowmoe.engine.statistics import RunStatistics
from lowmoe.errors import PromptError, UsageError
from lowmoe.families.aliases import DEMO
from lowmoe.library.configs import spec_of
from lowmoe.library.making import prepare, quantize_checkpoint
from lowmoe.library.names import LocalCheckpoint, Located, drop_finished_work, locate, made_folder
from lowmoe.library.options import MakeOptions
from lowmoe.plan.advice import advise
from lowmoe.plan.here import card_here
from lowmoe.plan.of_run import keep_run, predictor
from lowmoe.settings import Settings, read_settings

# A string to go on with, or chat messages, each with a "role" and a "content".
Messages: TypeAlias = Sequence[Mapping[str, str]]
Prompt: TypeAlias = str | Messages


class Model:
    """A model in memory.  Close it, or use it with `with`.  One thread at a time."""

    def __init__(self, runtime: Runtime) -> None:
        self.session: Session | None = Session(runtime)

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Give memory, files and threads back; what is asked afterwards raises UsageError."""
        if self.session is not None:
            self.session.close()
            self.session = None

    def _open_session(self) -> Session:
        if self.session is None:
            raise UsageError(CLOSED)
        return self.session

    @property
    def runtime(self) -> Runtime:
        """The parts the model is made of."""
        return self._open_session().runtime

    def options(self, **asked: Unpack[SamplingArguments]) -> SamplingOptions:
        """Settle sampling options: what is given, else what the model recommends, else ours."""
        return sampling_options(self.runtime.text.defaults, **asked)

    def stream(
        self,
        prompt: Prompt,
        *,
        constraint: Constraint | None = None,
        n_logprobs: int | None = None,
        **sampling: Unpack[SamplingArguments],
    ) -> Iterator[Token]:
        """Tokens of the answer as they are made.

        prompt: a string, or chat messages.  constraint: the form the answer must have, after the
        thinking of a model that thinks.  n_logprobs: tell of each token how likely it was, and so
        many of the likeliest beside it (Token.chosen).  sampling: SamplingArguments' options; those
        left out are what the model recommends, else lowmoe's own defaults.

        Raises PromptError for a prompt that is empty or too long, TextError for a model without a
        tokenizer, or for messages without a chat template, UsageError for an option out of its
        bounds or a form that an answer cannot be kept to.
        """
        return self.stream_with(
            prompt, self.options(**sampling), constraint=constraint, n_logprobs=n_logprobs
        )

    def stream_with(
        self,
        prompt: Prompt,
        options: SamplingOptions,
        *,
        constraint: Constraint | None = None,
        n_logprobs: int | None = None,
    ) -> Iterator[Token]:
        """The same with options that are settled."""
        return self._open_session().stream(
            self._encode(prompt), options, constraint=constraint, n_logprobs=n_logprobs
        )

    def stream_all(
        self,
        prompts: Sequence[Prompt],
        options: Sequence[SamplingOptions],
        *,
        constraint: Constraint | None = None,
    ) -> Iterator[tuple[int, Token]]:
        """Tokens of several answers as they are made, each with which prompt's it is.

        As many are decoded together as the model was loaded for (sequences); as one ends, the next
        begins.  options: one for each prompt, see `options`.  Errors are stream's.
        """
        if len(prompts) != len(options):
            raise UsageError(
                f"{len(prompts)} prompts, but {len(options)} sampling options. Give one for each."
            )
        ids = [self._encode(prompt) for prompt in prompts]
        return self._open_session().stream_all(ids, options, constraint=constraint)

    def _encode(self, prompt: Prompt) -> list[int]:
        if not prompt or (isinstance(prompt, str) and not prompt.strip()):
            raise PromptError("the prompt is empty. Give at least one word.")
        return self.runtime.text.encode(prompt)

    @overload
    def generate(
        self,
        prompt: Prompt,
        *,
        hide_thinking: bool = False,
        constraint: Constraint | None = None,
        **sampling: Unpack[SamplingArguments],
    ) -> str: ...

    @overload
    def generate(
        self,
        prompt: list[str] | list[Messages],
        *,
        hide_thinking: bool = False,
        constraint: Constraint | None = None,
        **sampling: Unpack[SamplingArguments],
    ) -> list[str]: ...

    def generate(
        self,
        prompt: Prompt | list[str] | list[Messages],
        *,
        hide_thinking: bool = False,
        constraint: Constraint | None = None,
        **sampling: Unpack[SamplingArguments],
    ) -> str | list[str]:
        """The whole answer, without the prompt, or of a list of prompts all their answers.

        hide_thinking: without what a reasoning model thinks before it, and the marks around that.

        Arguments and errors are stream's; several are decoded together as stream_all does.
        """
        options = self.options(**sampling)
        prompts = _several(prompt)
        answers = [""] * len(prompts)
        all_of_them = self.stream_all(prompts, [options] * len(prompts), constraint=constraint)
        for index, token in all_of_them:
            if token.kind == "answer" or not hide_thinking:
                answers[index] += token.text
        return answers if prompts is prompt else answers[0]

    def logits(self, ids: Sequence[int]) -> Tensor:
        """The scores after each token.  ids: token ids.  Returns float32 [T, V]."""
        ids = [int(token_id) for token_id in ids]
        if not ids:
            raise PromptError("no token ids were given. Give at least one.")
        if len(ids) > self.runtime.n_context:
            raise PromptError(
                f"{len(ids)} tokens, but the context holds {self.runtime.n_context}. Give fewer, "
                "or load with a larger context."
            )
        check_ids(ids, self.runtime.spec.n_vocab)
        session = self._open_session()
        session.rewind([])
        chunks = [session.logits(h) for h in session.forward(ids)]
        return torch.cat(chunks)

    def stop(self) -> None:
        """End the stream made last at its next token; any thread or signal handler may call it."""
        if self.session is not None:
            self.session.stop()

    def statistics(self) -> RunStatistics:
        """How the answer that began last went."""
        return self._open_session().statistics()

    def keep_run(self) -> None:
        """Let the last run correct what is predicted on this machine from now on."""
        keep_run(self.runtime, self.statistics(), read_settings())


def _several(prompt: Prompt | list[str] | list[Messages]) -> Sequence[Prompt]:
    """The list of prompts that it is, or one of it."""
    is_one = isinstance(prompt, str) or not prompt or isinstance(prompt[0], Mapping)
    return [prompt] if is_one else prompt  # type: ignore[list-item, return-value]


def load(
    model: str | Path = DEMO,
    *,
    gpu: str = "auto",
    bits: int | str = "auto",
    ram: str | int | None = None,
    vram: str | int | None = None,
    threads: int | None = None,
    context: int | None = None,
    kv: str | None = None,
    dtype: str | None = None,
    misses: str = LoadOptions().misses,
    sequences: int = LoadOptions().sequences,
    cache_aware_routing: float | None = None,
    miss_planes: int | None = None,
    report: Reporter | None = None,
) -> Model:
    """Load a model, making its model folder first if there is none yet.

    model: an alias, a hub repository id or a path to a model folder, checkpoint or GGUF file. With
    dtype ("float32", "bfloat16", "float16") a checkpoint or GGUF file runs as it is, straight from
    its files.
    The other options are LoadOptions'. report hears about downloads and quantizing.
    """
    options = LoadOptions(
        gpu=gpu,
        bits=bits,
        ram=ram,
        vram=vram,
        threads=threads,
        context=context,
        kv=kv,
        dtype=dtype,
        misses=misses,
        sequences=sequences,
        cache_aware_routing=cache_aware_routing,
        miss_planes=miss_planes,
    )
    return open_model(str(model), options, report or SilentReporter())


def open_model(name: str, options: LoadOptions, report: Reporter) -> Model:
    """What `load` does, its options already put together."""
    settings = read_settings()
    located = locate(name, settings)
    if options.dtype is not None:
        if not isinstance(located, LocalCheckpoint):
            raise UsageError(
                f"dtype runs a checkpoint on this disk unquantized, but {name} is none. "
                "Give the checkpoint's folder or GGUF file, or leave dtype out."
            )
        return Model(load_checkpoint(located.path, options))
    folder = _prepared(name, located, options, settings, report)
    runtime = load_folder(folder, options, report)
    card = None if runtime.gpu is None else card_here(options.gpu)
    predict = predictor(runtime, options, card, settings)
    return Model(replace(runtime, predict=predict))


def _prepared(
    name: str, located: Located, options: LoadOptions, settings: Settings, report: Reporter
) -> Path:
    """The model folder, made now if need be, at what is asked for or advised."""
    if made := made_folder(located, settings):
        drop_finished_work(made, settings)
        return made
    spec = spec_of(name, settings)
    advice = advise(name, spec, options, settings)
    making = MakeOptions(bits=advice.bits, threads=options.threads)
    return prepare(located, settings, making, OnceUnderWay(report, advice.words))


def quantize(
    source: str | Path,
    folder: str | Path,
    *,
    bits: int = MakeOptions().bits,
    format: str = MakeOptions().format,
    calibration: str | Path | None = None,
    calibrate: bool = True,
    threads: int | None = None,
    report: Reporter | None = None,
) -> None:
    """Make a model folder from a checkpoint folder or GGUF file.  The options are MakeOptions'.

    An interrupted call goes on where it stopped when it is made again.
    """
    options = MakeOptions(
        bits=bits,
        format=format,
        calibration=None if calibration is None else Path(calibration),
        calibrate=calibrate,
        threads=threads,
    )
    quantize_checkpoint(Path(source), Path(folder), options, report or SilentReporter())
