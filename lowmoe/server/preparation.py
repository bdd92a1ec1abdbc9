"""An ask made ready for the model: its tokens, its options, the form that its answers must have.

Knows:        what takes long and is done beside the event loop; that forms wait for each other, and
              nothing else for them.
Ignorant of:  whose turn it is, the model's thread.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from lowmoe.api import Model
from lowmoe.engine.answer import check_prompt
from lowmoe.engine.constraint import Constraint
from lowmoe.engine.forms import Form
from lowmoe.engine.options import SamplingOptions
from lowmoe.engine.tool_calls.format import ToolFormat
from lowmoe.errors import PromptError, UsageError
from lowmoe.server.asked import Prepared, offered
from lowmoe.server.asking import MAX_ANSWERS, MAX_LOGPROBS, Ask, shutting_down

LONG_CHARS = 20_000  # some ms of work, for which the event loop had better not stand still
MESSAGE_CHARS = 50  # that a message costs beside its text
MOST_SEED = 2**63  # seeds are below
# Forms compiled at once, each in a process of its own for up to 2 s, beside the model's threads.
N_COMPILING = 2


class Preparation:
    """Of the asks of one model; on the event loop."""

    def __init__(self, model: Model) -> None:
        self._model, self._runtime = model, model.runtime
        self._compiling = ThreadPoolExecutor(N_COMPILING, thread_name_prefix="form")
        self._closed = False

    def now(self, ask: Ask) -> Prepared:
        """An ask that does not take long.  Raises what is wrong with it."""
        prepared, constraint = self._prepared(ask)
        assert constraint is None, "a form takes long"
        return prepared

    async def beside(self, ask: Ask, *, is_wanted: Callable[[], bool]) -> Prepared:
        """Any ask, on other threads.  is_wanted: asked before a form is compiled.

        Raises what is wrong with it; Overloaded once nothing is prepared any more.
        """
        prepared, constraint = await asyncio.to_thread(self._prepared, ask)
        if constraint is None:
            return prepared
        if self._closed:
            raise shutting_down()
        compiled = asyncio.get_running_loop().run_in_executor(
            self._compiling, self._compile, constraint, is_wanted
        )
        try:
            return replace(prepared, form=await compiled)
        except asyncio.CancelledError:
            if self._closed:
                raise shutting_down() from None
            raise

    async def count_tokens(self, ask: Ask) -> int:
        """Of its prompt."""
        return len(await asyncio.to_thread(self._encode, ask))

    def close(self) -> None:
        """Forms that wait are compiled no more."""
        self._closed = True
        self._compiling.shutdown(wait=False, cancel_futures=True)

    @property
    def tool_format(self) -> ToolFormat:
        """How the model calls tools, where any are offered to it."""
        found = self._runtime.text.tool_calls
        assert found is not None, "who has messages written down has a template"
        return found

    # --- on any thread

    def _prepared(self, ask: Ask) -> tuple[Prepared, Constraint | None]:
        """And what form is to be compiled, if one is."""
        if not 1 <= ask.n <= MAX_ANSWERS:
            raise UsageError(f"n is {ask.n}, but must be 1 to {MAX_ANSWERS}.")
        if ask.n_logprobs is not None and not 0 <= ask.n_logprobs <= MAX_LOGPROBS:
            raise UsageError(f"n_logprobs is {ask.n_logprobs}, but must be 0 to {MAX_LOGPROBS}.")
        ids = self._encode(ask)
        check_prompt(self._runtime, ids)
        constraint = self._constraint(ask)
        form = None if constraint is None else self._runtime.forms.known(constraint)
        prepared = Prepared(prompt_ids=ids, options=self._options(ask, len(ids)), form=form)
        return prepared, constraint if form is None else None

    def _compile(self, constraint: Constraint, is_wanted: Callable[[], bool]) -> Form | None:
        return self._runtime.forms.compile(constraint) if is_wanted() else None

    def _encode(self, ask: Ask) -> list[int]:
        prompt = ask.prompt
        if isinstance(prompt, str):
            if not prompt.strip():
                raise PromptError("the prompt is empty. Give at least one word.")
            return self._runtime.text.encode(prompt, tools=offered(ask))
        if prompt and isinstance(prompt[0], int):
            return [i for i in prompt if isinstance(i, int)]
        messages = [m for m in prompt if not isinstance(m, int)]
        if not messages:
            raise PromptError("the conversation is empty. Give at least one message.")
        return self._runtime.text.encode(messages, tools=offered(ask), think=ask.think)

    def _constraint(self, ask: Ask) -> Constraint | None:
        """The form that was asked for, or that of a call, where one must come."""
        tools = offered(ask)
        if not tools:
            return ask.constraint
        if ask.constraint is not None:
            raise UsageError(
                f"{len(tools)} tools are offered, and the answer must have a form. Ask for one of "
                "them, or choose no tool."
            )
        return self.tool_format.grammar(tools, ask.tool_choice)

    def _options(self, ask: Ask, n_prompt: int) -> Sequence[SamplingOptions]:
        """Of each of its answers."""
        s = ask.sampling
        n_left = self._runtime.n_context - n_prompt
        first = self._model.options(
            temperature=s.temperature,
            top_k=s.top_k,
            top_p=s.top_p,
            min_p=s.min_p,
            repetition_penalty=s.repetition_penalty,
            seed=s.seed,
            stop=s.stop,
            max_new_tokens=n_left if s.max_new_tokens is None else s.max_new_tokens,
        )
        if s.seed is None:
            return [first] * ask.n
        return [replace(first, seed=(s.seed + i) % MOST_SEED) for i in range(ask.n)]


def takes_long(ask: Ask) -> bool:
    """To prepare: a form is compiled in a process of its own; tools, calls and long texts are
    written down and cut into tokens.
    """
    if ask.constraint is not None or ask.tools:
        return True
    if isinstance(ask.prompt, str):
        return len(ask.prompt) > LONG_CHARS
    messages = [m for m in ask.prompt if not isinstance(m, int)]
    if any(m.calls for m in messages):
        return True
    n_chars = sum(len(m.content) + len(m.thinking) + MESSAGE_CHARS for m in messages)
    return n_chars > LONG_CHARS
