"""`lowmoe run` answers once: text on stdout, figures on stderr or as JSON."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import lowmoe
from lowmoe.api import Model, Prompt
from lowmoe.engine.generate import Token
from lowmoe.engine.options import SamplingOptions
from lowmoe.engine.text_parts import TextParts
from lowmoe.kernels.cpu import KvPages
from tests.cli.conftest import RunCommand
from tests.engine.test_statistics import KEYS

GREEDY = ("--temperature", "0", "--max-new-tokens", "8")


@pytest.fixture(scope="module")
def answer(model_folder: Path) -> str:
    with lowmoe.load(model_folder) as model:
        return model.generate("Once", temperature=0.0, max_new_tokens=8)


def test_the_answer_goes_to_stdout_and_the_statistics_to_stderr(
    lowmoe_command: RunCommand, model_folder: Path, answer: str
) -> None:
    done = lowmoe_command("run", model_folder, "--prompt", "Once", *GREEDY)
    assert (done.code, done.out) == (0, answer + "\n")
    (line,) = done.err.splitlines()
    for figure in ("8 tokens", "first after", "prefill", "decode", "bound", "6 bits", "hits RAM"):
        assert figure in line


def test_json_is_the_last_line_of_stdout_with_the_keys_of_the_design(
    lowmoe_command: RunCommand, model_folder: Path, answer: str
) -> None:
    done = lowmoe_command("run", model_folder, "--prompt", "Once", *GREEDY, "--json")
    said, last = done.out.rsplit("\n", 2)[:2]
    values = json.loads(last)
    assert said == answer
    assert list(values) == KEYS
    assert (values["new_tokens"], values["bits"]) == (8, 6)
    for tiers in ("placement", "hit_rate", "bytes_per_token"):
        assert list(values[tiers]) == ["gpu", "ram", "disk"]
    assert done.err == ""


@pytest.mark.parametrize("kv", ["float32", "float16", "int8"])
def test_keys_and_values_are_kept_as_asked(
    lowmoe_command: RunCommand, model_folder: Path, monkeypatch: pytest.MonkeyPatch, kv: str
) -> None:
    formats: list[str] = []

    def remembering(*, format: str, **sizes: int) -> KvPages:
        formats.append(format)
        return KvPages(format=format, **sizes)

    monkeypatch.setattr("lowmoe.kernels.cpu.KvPages", remembering)
    done = lowmoe_command("run", model_folder, "--prompt", "Once", "--kv", kv, *GREEDY)
    assert (done.code, formats) == (0, [kv])


def test_the_prompt_may_come_from_stdin(
    lowmoe_command: RunCommand, model_folder: Path, answer: str
) -> None:
    assert lowmoe_command("run", model_folder, *GREEDY, stdin="Once").out == answer + "\n"


def test_a_chat_message_and_a_system_message_go_through_the_template(
    lowmoe_command: RunCommand, model_folder: Path
) -> None:
    def out(*arguments: str) -> str:
        return lowmoe_command("run", model_folder, *GREEDY, *arguments).out

    plain = out("--prompt", "<|user|>Hi<|end|><|assistant|>")
    assert out("--prompt", "Hi", "--chat") == plain
    with_system = out("--prompt", "<|system|>Sing.<|end|><|user|>Hi<|end|><|assistant|>")
    assert out("--prompt", "Hi", "--system", "Sing.") == with_system
    assert plain != with_system


def test_every_sampling_option_reaches_the_sampler(
    lowmoe_command: RunCommand, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[SamplingOptions] = []

    stream = Model.stream_with

    def remembering(self: Model, prompt: str, options: SamplingOptions) -> Iterator[Token]:
        asked.append(options)
        return stream(self, prompt, options)

    monkeypatch.setattr(Model, "stream_with", remembering)
    done = lowmoe_command(
        "run", model_folder, "--prompt", "Once",
        "--temperature", "0.5", "--top-k", "7", "--top-p", "0.8", "--min-p", "0.01",
        "--repetition-penalty", "1.1", "--seed", "3", "--stop", "x", "--stop", "yy",
        "--max-new-tokens", "2",
    )  # fmt: skip
    assert done.code == 0
    assert asked == [
        SamplingOptions(
            temperature=0.5,
            top_k=7,
            top_p=0.8,
            min_p=0.01,
            repetition_penalty=1.1,
            seed=3,
            stop=("x", "yy"),
            max_new_tokens=2,
        )
    ]


def test_options_of_loading_reach_the_model(
    lowmoe_command: RunCommand, model_folder: Path, answer: str
) -> None:
    done = lowmoe_command(
        "run", model_folder, "--prompt", "Once", *GREEDY, "--json",
        "--bits", "2", "--ram", "20MiB", "--threads", "1", "--context", "64", "--gpu", "none",
    )  # fmt: skip
    assert json.loads(done.out.splitlines()[-1])["bits"] == 2
    assert not done.out.startswith(answer)


def test_a_checkpoint_is_quantized_into_the_home_once_and_reused(
    lowmoe_command: RunCommand, talking_checkpoint: Path, home: Path
) -> None:
    command = ("run", talking_checkpoint, "--prompt", "Once", *GREEDY, "--bits", "2")
    first = lowmoe_command(*command)
    (folder,) = (home / "models").iterdir()
    written = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    second = lowmoe_command(*command)
    assert first.code == second.code == 0
    assert "quantize: " in first.err
    assert "quantize: " not in second.err
    assert first.out == second.out
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == written


def test_ctrl_c_ends_the_answer_within_a_token_and_still_says_how_it_went(
    lowmoe_command: RunCommand, model_folder: Path, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Model.stream_with
    seen: list[str] = []

    def pressing(self: Model, prompt: str, options: SamplingOptions) -> Iterator[Token]:
        for token in stream(self, prompt, options):
            seen.append(token.text)
            if len(seen) == 3:
                os.kill(os.getpid(), signal.SIGINT)
            yield token

    monkeypatch.setattr(Model, "stream_with", pressing)
    before = signal.getsignal(signal.SIGINT)
    done = lowmoe_command("run", model_folder, "--prompt", "Once", *GREEDY)
    assert done.code == 130
    assert 3 <= len(seen) <= 4
    assert done.out == "".join(seen) + "\n"
    assert answer.startswith("".join(seen).rstrip("\n"))
    assert "decode" in done.err
    assert "Traceback" not in done.err
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_does_not_wait_for_the_token(
    lowmoe_command: RunCommand, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def impatient(self: Model, prompt: str, options: SamplingOptions) -> Iterator[Token]:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        yield Token(1, "never")

    monkeypatch.setattr(Model, "stream_with", impatient)
    done = lowmoe_command("run", model_folder, "--prompt", "Once")
    assert (done.code, done.out) == (130, "")
    assert "Traceback" not in done.err


def test_ctrl_c_while_the_prompt_becomes_tokens_is_not_lost(
    lowmoe_command: RunCommand, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = TextParts.encode

    def pressing(self: TextParts, prompt: Prompt) -> list[int]:
        os.kill(os.getpid(), signal.SIGINT)
        return encode(self, prompt)

    monkeypatch.setattr(TextParts, "encode", pressing)
    done = lowmoe_command("run", model_folder, "--prompt", "Once", *GREEDY)
    assert (done.code, done.out) == (130, "\n")


def test_thinking_is_shown_unless_it_is_hidden(
    lowmoe_command: RunCommand, model_folder: Path, thinking_answers: list[str]
) -> None:
    command = ("run", model_folder, "--prompt", "Hi", "--chat")
    thinking_answers += ["<think>Hm</think>\n\nYes", "<think>Hm</think>\n\nYes", "<think>Hm"]
    assert lowmoe_command(*command).out == "<think>Hm</think>\n\nYes\n"
    assert lowmoe_command(*command, "--hide-thinking").out == "Yes\n"
    cut = lowmoe_command(*command, "--hide-thinking")
    assert cut.out == "\n"
    assert "It was still thinking when it ended." in cut.err


def test_python_hides_thinking_too(model_folder: Path, thinking_answers: list[str]) -> None:
    thinking_answers += ["<think>Hm</think>Yes"] * 3
    with lowmoe.load(model_folder) as model:
        assert model.generate("Hi") == "<think>Hm</think>Yes"
        assert model.generate("Hi", hide_thinking=True) == "Yes"
        kinds = {token.kind for token in model.stream("Hi") if token.text}
        assert kinds == {"mark", "thinking", "answer"}
