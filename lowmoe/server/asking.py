"""What a client asks for and what it is told, in nobody's dialect.

Knows:        the one vocabulary between the faces and who answers.
Ignorant of:  HTTP, field names of any API, threads and queues.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

from lowmoe.engine.constraint import Constraint
from lowmoe.engine.logprobs import ChosenToken as ChosenToken
from lowmoe.engine.logprobs import TokenChance as TokenChance
from lowmoe.engine.messages import Message, Tool, ToolChoice
from lowmoe.errors import LowMoeError

MAX_ANSWERS = 8  # of one Ask
MAX_LOGPROBS = 20  # alternatives of one token


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to choose tokens; None where the model's recommendation, else lowmoe's default, holds."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    max_new_tokens: int | None = None  # None: as many as the context holds


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request.

    prompt: messages to answer, a text or token ids to go on with.  think: whether a model that can
    be told so should think first, None as it likes.  n: answers; answer i is sampled with seed + i.
    n_logprobs: None for none, else how many alternatives are told beside each token, maybe 0.
    constraint: of the answer, not of the thinking before it; not together with tools.
    caller: whose turn it is counts by this.
    """

    prompt: tuple[Message, ...] | str | tuple[int, ...]
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = field(default_factory=ToolChoice)
    think: bool | None = None
    sampling: Sampling = field(default_factory=Sampling)
    constraint: Constraint | None = None
    n: int = 1
    n_logprobs: int | None = None
    caller: str = ""


# --- events, in the order in which they may come: Reading*, then for each answer
# (Text | CallBegan | CallArguments)* and one Ended, of several answers mixed.  A Failed ends all.


@dataclass(frozen=True, slots=True)
class Reading:
    """So much of the prompt was read; n_reused of it was there before."""

    n_read: int
    n_prompt: int
    n_reused: int


@dataclass(frozen=True, slots=True)
class Text:
    """More of answer `answer`, or of the thinking before it.  tokens: only if logprobs were asked
    for; what each was chosen as, maybe none where text was held back, maybe several.
    """

    answer: int
    kind: Literal["answer", "thinking"]
    text: str
    tokens: Sequence[ChosenToken] = ()


@dataclass(frozen=True, slots=True)
class CallBegan:
    """The answer calls a tool.  call: its number in the answer, from 0."""

    answer: int
    call: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the JSON of a call's arguments; the pieces together are one JSON object."""

    answer: int
    call: int
    json: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The answer is whole.  reason: an end token, a stop text (which one), calls to be made, or
    max_new_tokens or the context; cancelled: the server shuts down.  A call whose arguments break
    off makes it "length", however the answer ended.  n_new: tokens made, n_thinking of them before
    the answer.
    """

    answer: int
    reason: Literal["end", "stop", "calls", "length", "cancelled"]
    stop: str | None = None
    n_prompt: int
    n_reused: int
    n_new: int
    n_thinking: int


@dataclass(frozen=True, slots=True)
class Failed:
    """Nothing more comes of any answer."""

    error: LowMoeError


Event: TypeAlias = Reading | Text | CallBegan | CallArguments | Ended | Failed


class Overloaded(LowMoeError):
    """The queue is full.  Ask again later."""


def shutting_down() -> Overloaded:
    """What is said to who asks now."""
    return Overloaded("the server is shutting down. Ask again when it is back.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """The model that is served.  created: seconds since 1970, of the folder; n_context: tokens."""

    name: str
    created: int
    n_context: int
    can_chat: bool
    can_call_tools: bool
    thinks: bool


class Events(Protocol):
    """Events as they come.  An async generator is one; so is what can be closed unbegun."""

    def __aiter__(self) -> AsyncIterator[Event]:
        """Itself."""

    async def __anext__(self) -> Event:
        """The next one.  Raises StopAsyncIteration when all answers have ended, or one failed."""

    async def aclose(self) -> None:
        """Cancel what has not ended, within one token, even if nothing was awaited yet."""


class Service(Protocol):
    """Who answers.  Every method is called on the event loop."""

    @property
    def model(self) -> ModelCard:
        """The one that is served."""

    def ask(self, ask: Ask) -> Events:
        """Begin to answer; who asked closes the events, whatever happens.

        Raises at once, before the first event: PromptError for a prompt that is empty or too long,
        UsageError for an option out of its bounds, TextError without tokenizer or template,
        Overloaded.
        """

    async def count_tokens(self, ask: Ask) -> int:
        """Tokens of its prompt, as `ask` would read it.  Raises as `ask`."""
