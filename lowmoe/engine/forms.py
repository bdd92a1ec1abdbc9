"""Compiles the forms that answers must have, and refuses those that cannot be kept to.

Knows:        llguidance's grammars and limits, how large a form may be, how long it may take.
Ignorant of:  scores, what an answer has said so far.
"""

import functools
import json
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from torch import Tensor

from lowmoe.engine import form_trial
from lowmoe.engine.constraint import Constraint, Grammar, JsonSchema, Regex
from lowmoe.engine.text_parts import TextParts
from lowmoe.errors import UsageError

if TYPE_CHECKING:
    from llguidance import LLTokenizer
    from llguidance._lib import JsonCompileOptions

MAX_FORM_BYTES = 64 << 10
MAX_SCHEMA_DEPTH = 32
MAX_FORMS = 64  # kept compiled
COMPILE_S = 2.0
MAX_FAULT_CHARS = 300  # of llguidance's words
START_S = 30.0  # until a process runs, on a machine that has much else to do

# Half of llguidance's own: what needs more takes 0.3 s for one token and hundreds of megabytes.
_LIMITS: Mapping[str, Any] = {"initial_lexer_fuel": 500_000, "verbose_errors": False}


_Key: TypeAlias = tuple[str, str, bool]  # a form's kind, its text, whether from the start


class Matcher(Protocol):
    """What is used of llguidance.LLMatcher: it follows one text."""

    def compute_bitmask(self) -> bytes: ...

    def consume_token(self, sampled_token: int) -> bool: ...

    def deep_copy(self) -> "Matcher": ...

    def get_error(self) -> str: ...

    def is_error(self) -> bool: ...

    def is_stopped(self) -> bool: ...


class Form:
    """A constraint compiled for one vocabulary.

    grammar: in llguidance's words; tokens: what its tokens write; n_tokens: ids from there on are
    of no token, though the model gives them scores; end_ids: of the tokens that may end the answer,
    where it may end; from_start: the model's thinking before the answer has the form too.
    """

    def __init__(
        self, grammar: str, matcher: Matcher, vocabulary: "_Vocabulary", *, from_start: bool
    ) -> None:
        self.grammar, self._matcher, self.from_start = grammar, matcher, from_start
        self.tokens, self.n_tokens = vocabulary.of_ids, vocabulary.n_tokens
        self.end_ids = frozenset(vocabulary.own_end_ids)

    def matcher(self) -> Matcher:
        """For one answer, at its beginning."""
        return self._matcher.deep_copy()

    @functools.cached_property
    def not_end_ids(self) -> Tensor:
        """Of all tokens that end no answer, [A] int64."""
        return torch.tensor([i for i in range(self.n_tokens) if i not in self.end_ids])


class Forms:
    """The forms of one model's answers, the latest MAX_FORMS of them kept compiled.

    Any thread may ask; several may be tried at a time.  end_ids: those that config.json names.
    """

    def __init__(self, text: TextParts, end_ids: Collection[int]) -> None:
        self._text, self._config_end_ids = text, end_ids
        self._compiled: OrderedDict[_Key, Form] = OrderedDict()
        self._kept, self._compiling = threading.Lock(), threading.Lock()

    def known(self, constraint: Constraint) -> Form | None:
        """The form, if it is kept compiled.  Raises UsageError for one that is too large."""
        return self._latest(_key(constraint))

    def compile(self, constraint: Constraint) -> Form:
        """Raises UsageError for what is too large, takes too long, or cannot be kept to; TextError
        for a model without a tokenizer, or with one whose tokens' bytes are not known.
        """
        key = kind, text, from_start = _key(constraint)
        if form := self._latest(key):
            return form
        grammar = _grammar(kind, text)
        _try(kind, grammar, self._vocabulary.special)
        with self._compiling:
            # Another thread may have compiled it meanwhile.
            if form := self._latest(key):
                return form
            form = self._compile(kind, grammar, from_start=from_start)
            with self._kept:
                self._compiled[key] = form
                while len(self._compiled) > MAX_FORMS:
                    self._compiled.popitem(last=False)
            return form

    @functools.cached_property
    def _vocabulary(self) -> "_Vocabulary":
        return _Vocabulary(self._text, self._text.end_ids(self._config_end_ids))

    @functools.cached_property
    def _tokenizer(self) -> "LLTokenizer":
        from llguidance import LLTokenizer, TokenizerWrapper

        return LLTokenizer(TokenizerWrapper(self._vocabulary), eos_token=self._vocabulary.end_ids)

    def _latest(self, key: _Key) -> Form | None:
        with self._kept:
            form = self._compiled.get(key)
            if form is not None:
                self._compiled.move_to_end(key)
            return form

    def _compile(self, kind: str, grammar: str, *, from_start: bool) -> Form:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(**_LIMITS)
        matcher: Matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        matcher.compute_bitmask()
        if matcher.is_error():
            raise _refused(kind, matcher.get_error())
        return Form(grammar, matcher, self._vocabulary, from_start=from_start)


class _Vocabulary:
    """As llguidance asks for one: what tokens write, and how a text becomes tokens."""

    bos_token_id = None

    def __init__(self, text: TextParts, end_ids: Collection[int]) -> None:
        self._tokenizer, self.of_ids = text.tokenizer, text.token_bytes
        self.n_tokens = self._tokenizer.n_ids
        self.own_end_ids = sorted(i for i in end_ids if i < self.n_tokens)
        self.tokens = [self.of_ids[i] for i in range(self.n_tokens)]
        silent = (i for i in range(self.n_tokens) if self._tokenizer.is_silent(i))
        self.special_token_ids = [i for i in silent if self.tokens[i]]
        self.special = [self.tokens[i].decode() for i in self.special_token_ids]
        for i in self.special_token_ids:
            self.tokens[i] = b"\xff" + self.tokens[i]  # by which llguidance tells them from text
        # A model without end tokens ends where nothing can follow; llguidance wants one all the
        # same, so it gets an id that the model has no token for.
        self.end_ids = self.own_end_ids or [self.n_tokens]
        if not self.own_end_ids:
            self.tokens.append(b"\xff<end>")
            self.special_token_ids.append(self.n_tokens)
        self.eos_token_id = self.end_ids[0]

    def __call__(self, text: bytes | str) -> list[int]:
        """How a text that must come is written: as the tokenizer would, if that is all of it."""
        raw = text.encode() if isinstance(text, str) else text
        ids = self._tokenizer.encode_continuation(raw.decode("utf-8", "replace"))
        # Some tokenizers write a text otherwise than it is: other spaces, none at its beginning.
        # And the name of a special token, which are marked here, must be written out.
        if b"".join(self.tokens[i] for i in ids) == raw:
            return ids
        return self._longest_first(raw)

    def _longest_first(self, raw: bytes) -> list[int]:
        """As few as there are without looking ahead; shorter where nothing fits."""
        ids: list[int] = []
        while raw:
            n_bytes = next((n for n in range(len(raw), 0, -1) if raw[:n] in self._id_of), None)
            if n_bytes is None:
                break
            ids.append(self._id_of[raw[:n_bytes]])
            raw = raw[n_bytes:]
        return ids

    @functools.cached_property
    def _id_of(self) -> dict[bytes, int]:
        return {token: i for i, token in enumerate(self.tokens) if token}


def _key(constraint: Constraint) -> _Key:
    from_start = isinstance(constraint, Grammar) and constraint.from_start
    return (*_written(constraint), from_start)


def _written(constraint: Constraint) -> tuple[str, str]:
    """Its kind, in words for its errors, and its text."""
    if isinstance(constraint, JsonSchema):
        kind, text = "JSON schema", _schema_text(constraint.schema)
    elif isinstance(constraint, Regex):
        kind, text = "regular expression", constraint.pattern
    else:
        kind, text = "grammar", constraint.lark
    try:
        n_bytes = len(text.encode())
    except UnicodeEncodeError as error:
        raise UsageError(f"the {kind} is not Unicode ({error}). Write it anew.") from error
    if n_bytes > MAX_FORM_BYTES:
        raise UsageError(
            f"the {kind} has {n_bytes} bytes, but at most {MAX_FORM_BYTES} are read. Shorten it."
        )
    return kind, text


def _schema_text(schema: Mapping[str, Any]) -> str:
    if not isinstance(schema, Mapping):
        raise UsageError(
            f"the JSON schema is of type {type(schema).__name__}, but must be an object. "
            'Write {"type": "object"} for any object.'
        )
    if _deeper(schema, MAX_SCHEMA_DEPTH):
        raise UsageError(
            f"the JSON schema is nested deeper than {MAX_SCHEMA_DEPTH} levels. Take parts of it "
            'out into "$defs".'
        )
    try:
        return json.dumps(schema, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"the JSON schema is not JSON ({error}). Write it anew.") from error


def _deeper(value: object, n_levels: int) -> bool:
    if isinstance(value, Mapping):
        return n_levels == 0 or any(_deeper(inner, n_levels - 1) for inner in value.values())
    if isinstance(value, list | tuple):
        return n_levels == 0 or any(_deeper(inner, n_levels - 1) for inner in value)
    return False


def _grammar(kind: str, text: str) -> str:
    from llguidance import LLMatcher

    if kind == "JSON schema":
        return LLMatcher.grammar_from_json_schema(text, overrides=_json_style())
    if kind == "regular expression":
        return LLMatcher.grammar_from_regex(text)
    return LLMatcher.grammar_from_lark(text)


def _json_style() -> "JsonCompileOptions":
    """All of it, as a schema could choose what is left out."""
    return {
        "lenient": False,  # refuse keywords that are not implemented
        "coerce_one_of": False,
        # On one line, with a space after what divides, or none. Of white space anywhere and as much
        # as it likes, a model that does not know how to go on makes no end.
        "whitespace_flexible": False,
        "whitespace_pattern": None,
        "item_separator": ", ?",
        "key_separator": ": ?",
    }


def _try(kind: str, grammar: str, special: Sequence[str]) -> None:
    """Compile it in a process first: llguidance cannot be interrupted, and crashes on a chain of
    3,500 rules and does not come back from 1,000 patterns of properties within a minute.
    """
    asked = {
        "grammar": grammar,
        "special": special,
        "limits": dict(_LIMITS),
        "seconds": COMPILE_S,
        "path": [folder for folder in sys.path if folder],
    }
    try:
        tried = subprocess.run(
            [sys.executable, "-I", form_trial.__file__],
            input=json.dumps(asked).encode(),
            capture_output=True,
            timeout=START_S,
        )
    except subprocess.TimeoutExpired as error:
        raise _refused(kind, f"trying it took {START_S} s") from error
    if tried.returncode:
        raise _refused(kind, "compiling it takes too much memory or nests too deep")
    if fault := json.loads(tried.stdout)["fault"]:
        raise _refused(kind, fault)


def _refused(kind: str, fault: str) -> UsageError:
    lines = fault.replace("<non-verbose/>", "").strip().splitlines()
    # Of a pattern's errors the words come last, after a drawing of where.
    words = next((line for line in lines if line.startswith("error: ")), lines[0])
    if words.startswith("NoExtension"):
        words = "no text has this form"
    elif "retrieving it failed" in words:
        words = f"{words.split(' is not ')[0]} is elsewhere, and nothing is fetched"
    return UsageError(
        f"an answer cannot be kept to this {kind}: {words.strip()[:MAX_FAULT_CHARS]}. Change it, "
        "or leave it out."
    )
