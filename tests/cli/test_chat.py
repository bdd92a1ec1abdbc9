"""The chat remembers, obeys its commands, and no key costs the conversation."""

import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from lowmoe.api import Model, Prompt
from lowmoe.cli.chat import Chat
from lowmoe.engine.generate import Token
from lowmoe.engine.options import SamplingOptions
from lowmoe.errors import FolderError

ENTER, CTRL_C, CTRL_D, ALT_ENTER = "\r", "\x03", "\x04", "\x1b\r"
SAMPLING = SamplingOptions(temperature=0.0, max_new_tokens=6)


@dataclass(frozen=True, slots=True)
class Talked:
    """The chat after the user left, and what was printed."""

    chat: Chat
    out: str
    err: str

    @property
    def messages(self) -> list[tuple[str, str]]:
        return [(m["role"], m["content"]) for m in self.chat.messages]


Talk = Callable[..., Talked]


@pytest.fixture
def talk(model: Model, home: Path, capsys: pytest.CaptureFixture[str]) -> Talk:
    """Types keys into a chat; all of them must have been read when it ends."""

    def type_in(
        *keys: str, system: str | None = None, sampling: SamplingOptions = SAMPLING
    ) -> Talked:
        capsys.readouterr()
        chat = Chat(model, sampling, system)
        with (
            create_pipe_input() as pipe,
            create_app_session(input=pipe, output=DummyOutput()),
        ):
            pipe.send_text("".join(keys))
            chat.run()
        said = capsys.readouterr()
        return Talked(chat, said.out, said.err)

    return type_in


def test_a_conversation_is_remembered(talk: Talk, model: Model) -> None:
    talked = talk("Who is there?", ENTER, "And then?", ENTER, "/exit", ENTER)

    first, answer, second, then = talked.messages
    assert (first, second) == (("user", "Who is there?"), ("user", "And then?"))
    assert answer[0] == then[0] == "assistant"
    turns = [{"role": role, "content": text} for role, text in (first, answer, second)]
    again = model.generate(turns, temperature=0.0, max_new_tokens=6)
    assert again.strip() == then[1]
    assert answer[1] in talked.out
    assert talked.err.count("decode") == 2  # a line of statistics after every answer


def test_the_chat_introduces_itself(talk: Talk) -> None:
    assert "at 6 bits, context 384 tokens. /help lists the commands." in talk(CTRL_D).err


@pytest.mark.parametrize(
    "leaving", [("/exit", ENTER), (CTRL_D,), (CTRL_C, CTRL_C)], ids=["exit", "ctrl-d", "ctrl-c"]
)
def test_there_are_three_ways_to_leave(talk: Talk, leaving: tuple[str, ...]) -> None:
    assert talk("Hi", ENTER, *leaving).messages[0] == ("user", "Hi")


def test_one_ctrl_c_at_an_empty_prompt_says_what_a_second_does(talk: Talk) -> None:
    talked = talk(CTRL_C, "Hi", ENTER, CTRL_D)
    assert "Ctrl-C once more leaves." in talked.err
    assert len(talked.messages) == 2


def test_ctrl_c_over_typed_text_only_clears_it(talk: Talk) -> None:
    talked = talk("nonsense", CTRL_C, "more nonsense", CTRL_C, "Hi", ENTER, CTRL_D)
    assert talked.messages[0] == ("user", "Hi")
    assert "once more" not in talked.err


def test_two_ctrl_c_far_apart_do_not_leave(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowmoe.cli.chat.TWICE_WITHIN_S", 0.0)  # anything is far apart
    assert talk(CTRL_C, CTRL_C, CTRL_C, CTRL_D).err.count("once more leaves") == 3


# --- commands


def test_help_names_every_command(talk: Talk) -> None:
    talked = talk("/help", ENTER, CTRL_D)
    for command in ("/system", "/clear", "/retry", "/stats", "/experts", "/help", "/exit", '"""'):
        assert command in talked.out


def test_system_sets_shows_and_begins_again(talk: Talk, model: Model) -> None:
    talked = talk("Hi", ENTER, "/system Be  brief.", ENTER, "Hi", ENTER, "/system", ENTER, CTRL_D)
    assert talked.chat.system == "Be  brief."
    assert talked.out.count("system: Be  brief.") == 2
    (_, answer) = talked.messages
    asked = [{"role": "system", "content": "Be  brief."}, {"role": "user", "content": "Hi"}]
    assert model.generate(asked, temperature=0.0, max_new_tokens=6).strip() == answer[1]


def test_a_system_message_may_be_given_from_the_start(talk: Talk) -> None:
    assert "system: Sing." in talk("/system", ENTER, CTRL_D, system="Sing.").out
    assert "system: (none)" in talk("/system", ENTER, CTRL_D).out


def test_clear_forgets_the_conversation(talk: Talk) -> None:
    talked = talk("Hi", ENTER, "/clear", ENTER, CTRL_D)
    assert talked.messages == []
    assert "forgotten" in talked.out


def test_retry_answers_the_last_message_once_more(talk: Talk) -> None:
    once = talk("Hi", ENTER, CTRL_D)
    twice = talk("Hi", ENTER, "/retry", ENTER, CTRL_D)
    assert twice.messages == once.messages
    assert twice.err.count("decode") == 2


def test_there_is_nothing_to_retry_or_to_tell_at_first(talk: Talk) -> None:
    talked = talk("/retry", ENTER, "/stats", ENTER, CTRL_D)
    assert "There is nothing to answer yet." in talked.out
    assert "Nothing has been answered yet." in talked.out


def test_stats_shows_the_figures_again(talk: Talk) -> None:
    figures = [x for x in talk("Hi", ENTER, "/stats", ENTER, CTRL_D).err.splitlines() if "·" in x]
    assert len(figures) == 2
    assert figures[0].partition("bound")[0] == figures[1].partition("bound")[0]


def test_experts_shows_which_are_in_ram(talk: Talk, model: Model) -> None:
    talked = talk("Hi", ENTER, "/experts", ENTER, CTRL_D)
    residents = model.runtime.store.residents()
    rows = [line for line in talked.out.splitlines() if line.startswith("layer")]
    assert [row.count("■") for row in rows] == [len(residents[layer]) for layer in (0, 1)]
    assert all(row.count("■") + row.count("·") == 4 for row in rows)


@pytest.mark.parametrize("text", ["/dance", "/HELP", "/systems", "/"])
def test_an_unknown_command_is_not_sent_to_the_model(talk: Talk, text: str) -> None:
    talked = talk(text, ENTER, CTRL_D)
    assert f"{text} is no command; /help lists them." in talked.err
    assert talked.messages == []


# --- messages of several lines


def test_a_message_in_triple_quotes_ends_at_the_next_ones(talk: Talk) -> None:
    talked = talk('"""first', ENTER, "second", ENTER, 'third""" ignored', ENTER, CTRL_D)
    assert talked.messages[0] == ("user", "first\nsecond\nthird")


def test_triple_quotes_may_close_on_the_same_line(talk: Talk) -> None:
    assert talk('"""only this"""', ENTER, CTRL_D).messages[0] == ("user", "only this")


def test_alt_enter_starts_a_new_line(talk: Talk) -> None:
    talked = talk("first", ALT_ENTER, "second", ENTER, CTRL_D)
    assert talked.messages[0] == ("user", "first\nsecond")


def test_ctrl_c_leaves_a_message_of_several_lines(talk: Talk) -> None:
    talked = talk('"""first', ENTER, CTRL_C, "Hi", ENTER, CTRL_D)
    assert talked.messages[0] == ("user", "Hi")


def test_an_empty_line_asks_nothing(talk: Talk) -> None:
    assert talk(ENTER, "  ", ENTER, CTRL_D).messages == []


# --- what goes wrong


def test_ctrl_c_during_an_answer_keeps_the_conversation_and_what_was_said(
    talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = talk("Hi", ENTER, CTRL_D).messages[1][1]
    stream = Model.stream_with
    n_answers = 0

    def pressing(self: Model, prompt: Prompt, options: SamplingOptions) -> Iterator[Token]:
        nonlocal n_answers
        n_answers += 1
        for number, token in enumerate(stream(self, prompt, options), start=1):
            if (n_answers, number) == (1, 3):
                os.kill(os.getpid(), signal.SIGINT)
            yield token

    monkeypatch.setattr(Model, "stream_with", pressing)
    talked = talk("Hi", ENTER, "And then?", ENTER, CTRL_D)
    (_, partial, question, answer) = talked.messages
    assert partial[0] == "assistant"
    assert whole.startswith(partial[1])
    assert len(partial[1]) < len(whole)
    assert (question[1], answer[0]) == ("And then?", "assistant")
    assert "stopped" in talked.err


def test_a_message_that_cannot_be_answered_is_taken_back(talk: Talk) -> None:
    talked = talk("Hi", ENTER, "word " * 400, ENTER, "Ho", ENTER, CTRL_D)
    assert "tokens, but the context holds 384" in talked.err
    assert [text for role, text in talked.messages if role == "user"] == ["Hi", "Ho"]


def test_a_retry_that_fails_keeps_question_and_answer(
    talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, asked = Model.stream_with, 0

    def failing(self: Model, prompt: Prompt, options: SamplingOptions) -> Iterator[Token]:
        nonlocal asked
        asked += 1
        if asked == 2:
            raise FolderError("the disk is gone")
        return stream(self, prompt, options)

    once = talk("Hi", ENTER, CTRL_D).messages
    monkeypatch.setattr(Model, "stream_with", failing)
    talked = talk("Hi", ENTER, "/retry", ENTER, CTRL_D)
    assert "the disk is gone" in talked.err
    assert talked.messages == once


def test_thinking_is_shown_and_not_remembered(talk: Talk, thinking_answers: list[str]) -> None:
    thinking_answers += ["<think>Hm</think>\n\nYes"]
    talked = talk("Hi", ENTER, CTRL_D, sampling=SamplingOptions())
    assert "<think>Hm</think>\n\nYes\n" in talked.out
    assert talked.messages[1] == ("assistant", "Yes")


def test_questions_are_kept_for_the_next_time(talk: Talk, home: Path) -> None:
    talk("Who is there?", ENTER, CTRL_D)
    assert "+Who is there?" in (home / "chat_history").read_text()


def test_a_chat_goes_on_where_questions_cannot_be_kept(talk: Talk, home: Path) -> None:
    (home / "chat_history").mkdir(parents=True)
    talked = talk("Hi", ENTER, "Who is there?", ENTER, CTRL_D)
    assert "chat_history: cannot be written, so" in talked.err
    assert [content for role, content in talked.messages if role == "user"] == [
        "Hi",
        "Who is there?",
    ]


# --- in a terminal of its own


def test_without_a_prompt_a_terminal_gets_a_chat(model_folder: Path, home: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", "from lowmoe.cli.app import main; main()"]
    with subprocess.Popen(
        [*command, "run", str(model_folder), "--threads", "1", "--max-new-tokens", "3"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        close_fds=True,
    ) as process:
        os.close(theirs)
        terminal = Terminal(ours)
        terminal.wait_for(">>>")
        terminal.type("Hi" + ENTER)
        terminal.wait_for("decode")
        terminal.wait_for(">>>")
        terminal.type(CTRL_C)
        terminal.wait_for("once more leaves")
        terminal.wait_for(">>>")
        terminal.type(CTRL_D)
        assert process.wait(timeout=60) == 0
    os.close(ours)
    assert "Traceback" not in terminal.seen
    assert "+Hi" in (home / "chat_history").read_text()


class Terminal:
    """The side of a pseudo-terminal that a person sits at."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self.seen, self._at = descriptor, "", 0

    def type(self, keys: str) -> None:
        os.write(self._descriptor, keys.encode())

    def wait_for(self, text: str) -> None:
        """Read until text has come, after what was waited for before."""
        while (found := self.seen.find(text, self._at)) < 0:
            ready, _, _ = select.select([self._descriptor], [], [], 60)
            assert ready, f"no {text!r} in {self.seen!r}"
            data = os.read(self._descriptor, 65536).decode(errors="replace")
            if "\x1b[6n" in data:  # asks where the cursor is
                self.type("\x1b[1;1R")
            self.seen += data
        self._at = found + len(text)
