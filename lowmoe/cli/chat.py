"""The chat: a conversation in a terminal.

Knows:        the commands, the conversation so far, keys.
Ignorant of:  how an answer is made.
"""

import time
from collections.abc import Callable
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from lowmoe.api import Model
from lowmoe.checkpoint import files
from lowmoe.cli.render import err, out, print_statistics
from lowmoe.cli.run import stopping, write_answer
from lowmoe.engine.options import SamplingOptions
from lowmoe.errors import LowMoeError
from lowmoe.settings import read_settings

HELP = """\
/system TEXT   set the system message and begin again; without TEXT: show it
/clear         forget the conversation
/retry         answer the last message once more
/stats         how the last answer went
/experts       which experts are in RAM, layer by layer
/help          this
/exit          leave; so does Ctrl-D, or Ctrl-C twice at an empty prompt
Alt-Enter starts a new line. A message that begins with \"\"\" ends at the next \"\"\".
Ctrl-C stops an answer and keeps what there is of it."""

TWICE_WITHIN_S = 2.0


class Chat:
    """messages: the conversation, as chat messages, without what the model thought."""

    def __init__(
        self,
        model: Model,
        sampling: SamplingOptions,
        system: str | None,
        *,
        hide_thinking: bool = False,
    ) -> None:
        self.model, self.sampling, self.system = model, sampling, system
        self.hide_thinking = hide_thinking
        self.messages: list[dict[str, str]] = []
        self._interrupted_at = -TWICE_WITHIN_S
        self._answered = False
        self._commands: dict[str, Callable[[str], None]] = {
            "/system": self._set_system,
            "/clear": self._clear,
            "/retry": self._retry,
            "/stats": self._stats,
            "/experts": self._experts,
            "/help": lambda rest: out.print(HELP, markup=False),
        }

    def run(self) -> None:
        """Read and answer until the user leaves."""
        spec = self.model.runtime.spec
        err.print(
            f"{spec.n_parameters / 1e9:.3g}B parameters at {self.model.runtime.bits} bits, context "
            f"{self.model.runtime.n_context} tokens. /help lists the commands.",
            style="dim",
        )
        session = _prompt_session()
        while True:
            try:
                text = _read_message(session)
            except EOFError:
                return
            except KeyboardInterrupt:  # over typed text it only clears the line
                if not session.default_buffer.text and self._leaves():
                    return
                continue
            if text == "/exit":
                return
            if text:
                self._take(text)

    def _leaves(self) -> bool:
        now = time.monotonic()
        if now - self._interrupted_at < TWICE_WITHIN_S:
            return True
        self._interrupted_at = now
        err.print("Ctrl-C once more leaves.", style="dim")
        return False

    def _take(self, text: str) -> None:
        try:
            if text.startswith("/"):
                name, *rest = text.split(maxsplit=1)
                if name not in self._commands:
                    err.print(f"{name} is no command; /help lists them.", markup=False)
                    return
                self._commands[name]("".join(rest))
            else:
                self._ask([*self.messages, {"role": "user", "content": text}])
        except LowMoeError as e:
            err.print(str(e), style="red", markup=False, soft_wrap=True)

    def _ask(self, messages: list[dict[str, str]]) -> None:
        """Answer the last of messages; where that fails the conversation stays as it was."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        with stopping(self.model) as interrupted:
            said = write_answer(
                self.model,
                head + messages,
                self.sampling,
                interrupted,
                hide_thinking=self.hide_thinking,
            )
        # Models are trained to go on without what they thought before earlier answers.
        self.messages = [*messages, {"role": "assistant", "content": said.strip()}]
        self._answered = True
        if interrupted:
            err.print("stopped", style="dim")
        print_statistics(self.model.statistics())
        self.model.keep_run()

    # --- commands

    def _set_system(self, text: str) -> None:
        if text:
            self.system, self.messages = text, []
        out.print(f"system: {self.system or '(none)'}", markup=False)

    def _clear(self, rest: str) -> None:
        self.messages = []
        out.print("The conversation is forgotten.")

    def _retry(self, rest: str) -> None:
        if not self.messages:
            out.print("There is nothing to answer yet.")
            return
        self._ask(self.messages[:-1])

    def _stats(self, rest: str) -> None:
        if self._answered:
            print_statistics(self.model.statistics())
        else:
            out.print("Nothing has been answered yet.")

    def _experts(self, rest: str) -> None:
        store = self.model.runtime.store
        residents, where = store.residents(), {"gpu": "on the GPU", "ram": "in RAM"}[store.tier]
        for layer_id, layer in enumerate(self.model.runtime.spec.layers):
            here = set(residents.get(layer_id, []))
            row = "".join("■" if e in here else "·" for e in range(layer.feed_forward.n_experts))
            out.print(f"layer {layer_id:3}  {row}  {len(here)} {where}", markup=False)


def _prompt_session() -> PromptSession[str]:
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return PromptSession(history=_history(read_settings().home), key_bindings=keys)


def _history(home: Path) -> History:
    """Of what was typed, kept where it can be."""
    path = home / "chat_history"
    try:
        files.make_folder(home)
        path.open("a").close()
    except (OSError, LowMoeError):
        kept_nowhere = f"{path}: cannot be written, so what is typed here is not kept."
        err.print(kept_nowhere, style="dim", markup=False, soft_wrap=True)
        return InMemoryHistory()
    return FileHistory(str(path))


def _read_message(session: PromptSession[str]) -> str:
    text = session.prompt(">>> ")
    if text.lstrip().startswith('"""'):
        text = text.lstrip()[3:]
        while '"""' not in text:
            text += "\n" + session.prompt("... ")
        text = text.partition('"""')[0]
    return text.strip()
