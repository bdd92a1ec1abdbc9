"""How to choose the next token and when to stop: every option, its default and its bounds.

Knows:        what a caller may ask for, what generation_config.json may say, who wins.
Ignorant of:  logits, tokenizers, where the options came from (command line, HTTP or Python).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypedDict, TypeVar

from typing_extensions import Unpack

from lowmoe.errors import FolderError, UsageError

T = TypeVar("T")
Number = int | float

# 16 strings of 256 characters keep the search after every token in the microseconds.
MAX_STOPS = 16
MAX_STOP_CHARS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bounds:
    """What one number may be, as a test and in words. NaN fails every comparison, so every test."""

    whole: bool = False
    accepts: Callable[[Number], bool]
    words: str

    def fault(self, value: object) -> str | None:
        """Say what is wrong with value, or None if nothing is."""
        kinds = (int,) if self.whole else (int, float)
        # bool is an int to Python; as a temperature it is a mistake.
        if isinstance(value, bool) or not isinstance(value, kinds) or not self.accepts(value):
            return f"is {value!r}, but must be {self.words}"
        return None


# Below 0.001 the division by the temperature would leave float32's range on ordinary logits.
_TEMPERATURE = _Bounds(
    accepts=lambda x: x == 0 or 0.001 <= x <= 100,
    words="0 (likeliest token) or a number from 0.001 to 100",
)
_TOP_K = _Bounds(
    whole=True,
    accepts=lambda x: 0 <= x <= 10_000_000,
    words="a whole number from 0 (off) to 10000000",
)
_TOP_P = _Bounds(accepts=lambda x: 0 < x <= 1, words="a number above 0 and at most 1 (off)")
_MIN_P = _Bounds(accepts=lambda x: 0 <= x <= 1, words="a number from 0 (off) to 1")
_REPETITION_PENALTY = _Bounds(
    accepts=lambda x: 0.01 <= x <= 100, words="a number from 0.01 to 100 (1 is off)"
)
# What torch.Generator.manual_seed takes, without its negative spellings of the same seeds.
_SEED = _Bounds(
    whole=True, accepts=lambda x: 0 <= x < 2**63, words="a whole number from 0 to 2**63 - 1"
)
_MAX_NEW_TOKENS = _Bounds(
    whole=True,
    accepts=lambda x: 1 <= x <= 10_000_000,
    words="a whole number from 1 to 10000000",
)
_TOKEN_ID = _Bounds(
    whole=True, accepts=lambda x: 0 <= x < 2**31, words="a whole number from 0 to 2**31 - 1"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How to choose the next token, and when to stop.

    Raises UsageError if a field is outside its bounds.
    """

    temperature: float = 0.7  # 0 picks the likeliest token
    top_k: int = 0  # 0 is off
    top_p: float = 0.9  # 1 is off
    min_p: float = 0.0  # 0 is off
    repetition_penalty: float = 1.0  # 1 is off
    seed: int | None = None  # None: another answer every time
    stop: tuple[str, ...] = ()  # the answer ends before the first of these
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, _TEMPERATURE)
        _check("top_k", self.top_k, _TOP_K)
        _check("top_p", self.top_p, _TOP_P)
        _check("min_p", self.min_p, _MIN_P)
        _check("repetition_penalty", self.repetition_penalty, _REPETITION_PENALTY)
        if self.seed is not None:
            _check("seed", self.seed, _SEED)
        _check("max_new_tokens", self.max_new_tokens, _MAX_NEW_TOKENS)
        _check_stops(self.stop)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """What a model's authors recommend in generation_config.json; None where they say nothing."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    eos_ids: tuple[int, ...] = ()  # any of these tokens ends an answer

    @staticmethod
    def from_bytes(generation_config_json: bytes) -> "GenerationDefaults":
        """Read the file's bytes strictly; keys that are not ours are left to those they belong to.

        `"do_sample": false` is temperature 0, whatever else the file says. null is absence.

        Raises FolderError naming the key if a value has the wrong type or is out of bounds.
        """
        fields = _json_object(generation_config_json)
        do_sample = fields.get("do_sample")
        if do_sample is not None and not isinstance(do_sample, bool):
            raise _config_fault("do_sample", f"is {do_sample!r}, but must be true or false")
        temperature = _number(fields, "temperature", _TEMPERATURE)
        return GenerationDefaults(
            temperature=0.0 if do_sample is False else temperature,
            top_k=_whole_number(fields, "top_k", _TOP_K),
            top_p=_number(fields, "top_p", _TOP_P),
            min_p=_number(fields, "min_p", _MIN_P),
            repetition_penalty=_number(fields, "repetition_penalty", _REPETITION_PENALTY),
            max_new_tokens=_whole_number(fields, "max_new_tokens", _MAX_NEW_TOKENS),
            eos_ids=_eos_ids(fields.get("eos_token_id")),
        )


class SamplingArguments(TypedDict, total=False):
    """SamplingOptions as they are asked for: None, or left out, is what the model recommends, else
    lowmoe's own default.
    """

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: Sequence[str] | None
    max_new_tokens: int | None


def sampling_options(
    defaults: GenerationDefaults, **asked: Unpack[SamplingArguments]
) -> SamplingOptions:
    """Settle each option: what was asked for, else what the model recommends, else our default.

    Raises UsageError if what was asked for is outside its bounds, or no option of that name is.
    """
    ours = SamplingOptions()
    if unknown := asked.keys() - SamplingArguments.__annotations__.keys():
        raise UsageError(
            f"{', '.join(sorted(unknown))}: no such option. Give any of "
            f"{', '.join(SamplingArguments.__annotations__)}."
        )
    stop = asked.get("stop")
    if isinstance(stop, str):
        raise UsageError(f"stop is the string {stop!r}, but must be a list; write [{stop!r}]")
    return SamplingOptions(
        temperature=_first(asked.get("temperature"), defaults.temperature, ours.temperature),
        top_k=_first(asked.get("top_k"), defaults.top_k, ours.top_k),
        top_p=_first(asked.get("top_p"), defaults.top_p, ours.top_p),
        min_p=_first(asked.get("min_p"), defaults.min_p, ours.min_p),
        repetition_penalty=_first(
            asked.get("repetition_penalty"), defaults.repetition_penalty, ours.repetition_penalty
        ),
        seed=asked.get("seed"),
        stop=ours.stop if stop is None else tuple(stop),
        max_new_tokens=_first(
            asked.get("max_new_tokens"), defaults.max_new_tokens, ours.max_new_tokens
        ),
    )


def _first(asked: T | None, recommended: T | None, ours: T) -> T:
    if asked is not None:
        return asked
    return ours if recommended is None else recommended


def _check(name: str, value: object, bounds: _Bounds) -> None:
    fault = bounds.fault(value)
    if fault is not None:
        raise UsageError(f"{name} (--{name.replace('_', '-')}) {fault}")


def _check_stops(stops: object) -> None:
    if not isinstance(stops, tuple):
        raise UsageError(f"stop is {stops!r}, but must be a tuple of strings")
    if len(stops) > MAX_STOPS:
        raise UsageError(f"stop (--stop) holds {len(stops)} strings, but at most {MAX_STOPS} fit")
    for stop in stops:
        if not isinstance(stop, str) or not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise UsageError(
                f"stop (--stop) holds {stop!r}, "
                f"but each must be a string of 1 to {MAX_STOP_CHARS} characters"
            )


def _json_object(data: bytes) -> dict[str, object]:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FolderError(
            f"generation_config.json is not JSON ({error}); download the file again"
        ) from error
    if not isinstance(fields, dict):
        raise FolderError(
            f"generation_config.json holds a {type(fields).__name__}, but must hold an object; "
            "download the file again"
        )
    return fields


def _config_fault(key: str, fault: str) -> FolderError:
    return FolderError(f"generation_config.json: {key} {fault}; correct the file or remove the key")


def _number(fields: dict[str, object], key: str, bounds: _Bounds) -> float | None:
    value = fields.get(key)
    if value is None:
        return None
    fault = bounds.fault(value)
    if fault is not None:
        raise _config_fault(key, fault)
    assert isinstance(value, int | float)  # bounds.fault has just said so
    return value


def _whole_number(fields: dict[str, object], key: str, bounds: _Bounds) -> int | None:
    value = _number(fields, key, bounds)
    assert value is None or isinstance(value, int)  # bounds.whole
    return value


def _eos_ids(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    eos_ids: list[int] = []
    for eos_id in value if isinstance(value, list) else [value]:
        fault = _TOKEN_ID.fault(eos_id)
        if fault is not None:
            raise _config_fault("eos_token_id", fault)
        assert isinstance(eos_id, int)  # fault has just said so
        eos_ids.append(eos_id)
    return tuple(eos_ids)
