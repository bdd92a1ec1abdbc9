"""What chat completions and completions tell alike: how answers ended, what they cost, chances.

Knows:        finish_reason, usage, logprobs.
Ignorant of:  requests, HTTP.
"""

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lowmoe.server.asking import ChosenToken, Ended, Reading, TokenChance

DONE = "data: [DONE]\n\n"
# What stands for the logarithm of 0, which JSON cannot write.
NO_CHANCE = -9999.0

_FINISH_REASONS = {"end": "stop", "stop": "stop", "calls": "tool_calls", "length": "length"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What begins every piece of one answer.  prefix: of its id."""

    prefix: str
    object: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))
    number: str = field(default_factory=lambda: uuid.uuid4().hex)

    def write(self, **fields: Any) -> dict[str, Any]:
        """One object with this head."""
        id_ = f"{self.prefix}-{self.number}"
        head = {"id": id_, "object": self.object, "created": self.created, "model": self.model}
        return {**head, **fields}


def progress(reading: Reading) -> str:
    """A comment, which clients skip, so that who looks at the stream sees the prompt being read."""
    return f": {reading.n_read} of {reading.n_prompt} tokens read\n\n"


def finish_reason(ended: Ended) -> str:
    """Why an answer ended."""
    return _FINISH_REASONS[ended.reason]


def usage(prompts: Iterable[Sequence[Ended]]) -> dict[str, Any]:
    """Tokens of all answers; of answers to the same prompt it is counted once."""
    answers = [list(ends) for ends in prompts]
    n_prompt = sum(ends[0].n_prompt for ends in answers)
    # What one answer leaves in the cache for the next of the same prompt was not there before.
    n_reused = sum(min(ended.n_reused for ended in ends) for ends in answers)
    n_new = sum(ended.n_new for ends in answers for ended in ends)
    n_thinking = sum(ended.n_thinking for ends in answers for ended in ends)
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_new,
        "total_tokens": n_prompt + n_new,
        "prompt_tokens_details": {"cached_tokens": n_reused},
        "completion_tokens_details": {"reasoning_tokens": n_thinking},
    }


def logprob(chance: TokenChance) -> float:
    """Its logarithm, as JSON can write it."""
    return max(chance.logprob, NO_CHANCE)


def chance_of(chance: TokenChance) -> dict[str, Any]:
    """One token and its chance."""
    return {"token": chance.text, "logprob": logprob(chance), "bytes": list(chance.raw)}


def chances_of(tokens: Iterable[ChosenToken]) -> list[dict[str, Any]]:
    """Tokens, their chances and those of others in their places."""
    return [
        {**chance_of(token.chance), "top_logprobs": [chance_of(other) for other in token.others]}
        for token in tokens
    ]
