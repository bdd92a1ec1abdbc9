"""`lowmoe run`: one answer, or a chat.

Knows:        prompts from the command line or stdin, Ctrl-C, where the statistics line goes.
Ignorant of:  how an answer is made.
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from lowmoe.api import Model, Prompt, open_model
from lowmoe.checkpoint.files import write_whole
from lowmoe.cli.render import TerminalReporter, err, print_json, print_statistics
from lowmoe.engine.load_options import LoadOptions
from lowmoe.engine.options import SamplingOptions
from lowmoe.errors import PromptError, UsageError
from lowmoe.library.names import locate
from lowmoe.settings import read_settings
from lowmoe.timeline import Timeline

THOUGHT_ONLY = (
    "It was still thinking when it ended. Give it a larger --max-new-tokens, or leave "
    "--hide-thinking out to see what it thought."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What to do.  prompt: None to read stdin or to chat; chat: take it as a message;
    hide_thinking: show answers alone; timeline: where to write one.
    """

    prompt: str | None
    chat: bool
    system: str | None
    json: bool
    hide_thinking: bool = False
    timeline: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Generating:
    """Sampling options as typed; None leaves them to the model."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: list[str] | None
    max_new_tokens: int | None

    def settled(self, model: Model) -> SamplingOptions:
        """With the model's recommendations."""
        return model.options(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            stop=self.stop,
            max_new_tokens=self.max_new_tokens,
        )


def load_model(name: str, options: LoadOptions) -> Model:
    """Load with progress on stderr."""
    with TerminalReporter() as report:
        return open_model(name, options, report)


def require_place(file: Path, option: str) -> None:
    """Raises UsageError where a file cannot be written, before it takes minutes to know what."""
    if file.is_dir() or not file.parent.is_dir():
        raise UsageError(
            f"--{option} is {file}, but that is a folder or in none. Give a file's name in a "
            "folder that is there."
        )


@contextmanager
def traced(options: LoadOptions, file: Path | None) -> Iterator[LoadOptions]:
    """Options of a model whose timeline is written to a file at the end, however that comes."""
    if file is None:
        yield options
        return
    require_place(file, "trace-timeline")
    timeline = Timeline()
    try:
        yield replace(options, timeline=timeline)
    finally:
        write_whole(file, timeline.to_json())


def run_model(name: str, asked: Asked, options: LoadOptions, generating: Generating) -> None:
    """Load and answer, or chat where there is a terminal and no prompt."""
    prompt = asked.prompt
    chatting = prompt is None and sys.stdin.isatty()
    if chatting and asked.json:
        raise UsageError("--json is for one answer. Give --prompt, or leave --json out.")
    if prompt is None and not chatting:
        prompt = _read_stdin()
    locate(name, read_settings())  # before a prompt is missed: a name that means nothing is worse
    if prompt is not None and not prompt.strip():
        raise PromptError("the prompt is empty. Give at least one word: --prompt, or stdin.")
    with (
        traced(options, asked.timeline) as traced_options,
        load_model(name, traced_options) as model,
    ):
        sampling = generating.settled(model)
        if prompt is None:
            from lowmoe.cli.chat import Chat

            Chat(model, sampling, asked.system, hide_thinking=asked.hide_thinking).run()
            return
        answer(model, _as_asked(prompt, asked), sampling, asked)


def _read_stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as e:
        raise PromptError(f"stdin is not text in {e.encoding} ({e.reason}). Convert it.") from e


def _as_asked(prompt: str, asked: Asked) -> Prompt:
    if not asked.chat:
        return prompt
    messages = [{"role": "user", "content": prompt}]
    return ([{"role": "system", "content": asked.system}] if asked.system else []) + messages


def answer(model: Model, prompt: Prompt, sampling: SamplingOptions, asked: Asked) -> None:
    """Stream one answer to stdout and end with the statistics; Ctrl-C ends it early, code 130."""
    with stopping(model) as interrupted:
        write_answer(model, prompt, sampling, interrupted, hide_thinking=asked.hide_thinking)
    if asked.json:
        print_json(model.statistics().to_json())
    else:
        print_statistics(model.statistics())
    model.keep_run()
    if interrupted:
        raise KeyboardInterrupt


def write_answer(
    model: Model,
    prompt: Prompt,
    sampling: SamplingOptions,
    interrupted: list[bool],
    *,
    hide_thinking: bool,
) -> str:
    """Stream an answer and a line break to stdout.  interrupted: what `stopping` yields.

    Returns the answer without the thinking before it.
    """
    tokens = model.stream_with(prompt, sampling)
    if interrupted:  # while the prompt became tokens, when there was no stream to stop yet
        model.stop()
    said, thought = "", False
    for token in tokens:
        if token.kind == "answer":
            said += token.text
        elif hide_thinking:
            thought = True
            continue
        sys.stdout.write(token.text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    if thought and not said:
        err.print(THOUGHT_ONLY, style="dim", soft_wrap=True)
    return said


@contextmanager
def stopping(model: Model) -> Iterator[list[bool]]:
    """Let Ctrl-C end the answer at its next token; a second one interrupts at once.

    Yields a list that is empty until Ctrl-C was pressed.
    """
    pressed: list[bool] = []

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)
        model.stop()

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
