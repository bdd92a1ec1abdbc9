"""One answer: from a prompt to its last token.

Knows:        how tokens are chosen and spelled, what ends an answer.
Ignorant of:  where scores come from, what else is answered at the same time.
"""

import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from lowmoe.engine.constraint import Constraint
from lowmoe.engine.conversation import Conversation, Reuse
from lowmoe.engine.forms import Form
from lowmoe.engine.kept_to_form import KeptToForm
from lowmoe.engine.logprobs import Chances, ChosenToken
from lowmoe.engine.options import SamplingOptions
from lowmoe.engine.run_clock import RunClock, Tally
from lowmoe.engine.runtime import Runtime
from lowmoe.engine.sampling import Sampler
from lowmoe.engine.spelling import Kind, Said, Spelling
from lowmoe.engine.tool_calls.splitter import CallSplitter
from lowmoe.errors import ContextError, LowMoeError, PromptError, UsageError

# An end token, a stop text, max_new_tokens or the context, `cancel`, a LowMoeError, another answer
# that took its place.
EndReason: TypeAlias = Literal["end", "stop", "length", "cancelled", "error", "overtaken"]


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer.  text: what became printable with it, often a word, maybe nothing.

    id: None where text is left: of an answer that has ended, which was held back because it might
    have become a stop string or a character; or of a token that has text of several kinds.
    kind: whether the text is of the answer, of the model's thinking before it, or a mark between
    the two, such as `</think>`; or the name of a tool whose call begins, or more of its arguments.
    chosen: if logprobs were asked for, of the tokens that this text ends with, in order: none while
    it is held back, then several.
    """

    id: int | None
    text: str
    kind: Kind = "answer"
    chosen: tuple[ChosenToken, ...] = ()


class Answer:
    """A prompt and the tokens after it so far, prompt included in `context`.

    reuse: see Reuse.
    end: None while more tokens come; error: what ended it, if an error did.
    """

    def __init__(
        self,
        runtime: Runtime,
        prompt_ids: Sequence[int],
        options: SamplingOptions,
        *,
        end_ids: Collection[int],
        spelled: bool = True,
        reuse: Reuse = "any",
        constraint: Constraint | Form | None = None,
        n_logprobs: int | None = None,
        calls: CallSplitter | None = None,
    ) -> None:
        """spelled: with text, and ended by stop texts too.  constraint: the form it must have,
        compiled now, in up to 2 s, unless runtime.forms has it.  n_logprobs: how many of the
        likeliest tokens are told beside each, None for nothing of the kind.  calls: tells calls of
        tools from text.

        Raises PromptError for a prompt that is empty, not of this vocabulary, or leaves no room;
        UsageError for a form that cannot be kept to.
        """
        check_prompt(runtime, prompt_ids)
        if n_logprobs is not None and not 0 <= n_logprobs <= runtime.spec.n_vocab:
            raise UsageError(
                f"n_logprobs is {n_logprobs}, but must be from 0 to {runtime.spec.n_vocab}, the "
                "tokens there are."
            )
        self.context, self.n_prompt, self.reuse = list(prompt_ids), len(prompt_ids), reuse
        self.n_reused = 0
        self.clock = RunClock(runtime, len(prompt_ids))
        self.end: EndReason | None = None
        self.error: LowMoeError | None = None
        self._sampler, self._end_ids = Sampler(options), end_ids
        self._n_most = min(len(prompt_ids) + options.max_new_tokens, runtime.n_context)
        self._spelling = (
            Spelling(runtime.text, options.stop, prompt_ids, calls=calls) if spelled else None
        )
        form = None
        if constraint is not None:
            form = constraint if isinstance(constraint, Form) else runtime.forms.compile(constraint)
        self._form = None if form is None else KeptToForm(form, self._spelling)
        self._chances = None
        if n_logprobs is not None:
            self._chances = Chances(runtime.text.token_bytes, n_logprobs)
        self._new: list[Token] = []
        self._cancelled = threading.Event()
        self._conversation: Conversation | None = None

    @property
    def n_new(self) -> int:
        """Tokens made, an end token included."""
        return len(self.context) - self.n_prompt

    @property
    def stop_text(self) -> str | None:
        """The stop text that ended it, where one did."""
        return None if self._spelling is None else self._spelling.stop

    @property
    def is_cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """End it before its next token; any thread or signal handler may call it."""
        self._cancelled.set()

    @property
    def has_new(self) -> bool:
        """Whether there are tokens to `take`."""
        return bool(self._new)

    def take(self) -> list[Token]:
        """The tokens since the last call."""
        new, self._new = self._new, []
        return new

    # --- for who decodes

    @property
    def conversation(self) -> Conversation:
        """Where it is computed, once it is."""
        assert self._conversation is not None
        return self._conversation

    def begin(self, conversation: Conversation) -> None:
        """Go on in this cache."""
        # The last prompt token is always run again, for its scores are what the answer begins with;
        # and alone, since many tokens at once round otherwise than one. So the same prompt has the
        # same answer whether or not it was in the cache.
        self.n_reused = conversation.keep(self.context[:-1], self.reuse)
        self._conversation, conversation.n_prompt = conversation, self.n_prompt
        self.clock.begin(self.n_prompt - self.n_reused)

    def settle(self) -> None:
        """Forget what a step computed that failed before another token was chosen."""
        self.conversation.forget_beyond(len(self.context) - 1)

    @property
    def is_read(self) -> bool:
        """Whether all tokens before the latest are in the cache, so that it can be run."""
        return self.conversation.n_tokens == len(self.context) - 1

    @property
    def missing(self) -> list[int]:
        """Those that are not."""
        return self.context[self.conversation.n_tokens : -1]

    def go_on(self, scores: Tensor, tally: Tally) -> None:
        """Choose the next token.  scores: [V] after the latest; tally: after the step they are of.

        What goes wrong with this answer alone ends this answer alone.
        """
        try:
            token_id = self._pick(scores)
        except LowMoeError as error:
            self.error = error
            self.finish("error")
            return
        self.clock.token(tally)
        self.context.append(token_id)
        if token_id in self._end_ids:
            self.finish("end")
        elif self._say(token_id, scores):
            self._end("stop")
        elif self._form is not None and self._form.is_whole and not self._end_ids:
            self.finish("end")
        elif len(self.context) >= self._n_most:
            self.finish("length")

    def finish(self, reason: EndReason) -> None:
        """No more tokens come; text that was held back does."""
        pieces, stopped = self._spelling.flush() if self._spelling else ([], False)
        self._new += [_token(None, said) for said in pieces]
        self._end("stop" if stopped else reason)

    def _pick(self, scores: Tensor) -> int:
        if self._form is None:
            return self._sampler.pick(scores, self.context)
        allowed = self._form.allowed()
        token_id = self._sampler.pick(scores, self.context, allowed)
        while not self._form.may_take(token_id):
            allowed = allowed[allowed != token_id]
            token_id = self._sampler.pick(scores, self.context, allowed)
        if token_id not in self._end_ids:
            self._form.take(token_id)
        return token_id

    def _say(self, token_id: int, scores: Tensor) -> bool:
        """Whether a stop text has come."""
        chosen = None if self._chances is None else self._chances.of(token_id, scores)
        if self._spelling is None:
            self._new.append(Token(token_id, "", chosen=() if chosen is None else (chosen,)))
            return False
        pieces, stopped = self._spelling.push(token_id, chosen)
        first, *others = pieces or [Said(self._spelling.kind, "")]
        self._new.append(_token(token_id, first))
        self._new += [_token(None, said) for said in others]
        return stopped

    def _end(self, reason: EndReason) -> None:
        self.end = reason
        self.clock.ended()


def _token(token_id: int | None, said: Said) -> Token:
    return Token(token_id, said.text, said.kind, said.chosen)


def check_prompt(runtime: Runtime, prompt_ids: Sequence[int]) -> None:
    """Raises PromptError for what no answer can follow."""
    if not prompt_ids:
        raise PromptError("the prompt is empty. Give at least one word.")
    n_context = runtime.n_context
    if len(prompt_ids) >= n_context:
        larger = ", or give a larger --context" * (n_context < runtime.spec.context_length)
        raise ContextError(
            f"the prompt has {len(prompt_ids)} tokens, but the context holds {n_context} and "
            f"must leave room for an answer. Shorten it{larger}."
        )
    check_ids(prompt_ids, runtime.spec.n_vocab)


def check_ids(ids: Sequence[int], n_vocab: int) -> None:
    """Raises PromptError for a token id outside the vocabulary."""
    for token_id in ids:
        if not 0 <= token_id < n_vocab:
            raise PromptError(
                f"token id {token_id}, but the vocabulary has ids 0 to {n_vocab - 1}."
            )
