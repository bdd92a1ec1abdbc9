"""Text to token ids and back, whole or one token at a time, and stop strings.

Knows:        the tokenizers library, unfinished characters, strings that end an answer.
Ignorant of:  chat templates and roles, how a token was chosen, which tokens end an answer.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from lowmoe.errors import PromptError, TextError

_UNDECODABLE = "\ufffd"

# The bytes, so at most the tokens, that an unfinished UTF-8 character can have.
MAX_UNFINISHED = 3

# Text that only ever ends in undecodable bytes would otherwise be decoded from its start again
# with every token. Any window longer than an unfinished character works.
MAX_WINDOW = 16


class Tokenizer:
    """A model's tokenizer.json."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        # Some files carry the settings of the training run; a prompt is never cut or filled up.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._newline_ids = tokenizer.encode("\n", add_special_tokens=False).ids
        self._added = tokenizer.get_added_tokens_decoder()

    @staticmethod
    def from_bytes(tokenizer_json: bytes) -> "Tokenizer":
        """Read a tokenizer.json. Raises TextError if it is damaged."""
        try:
            tokenizer = tokenizers.Tokenizer.from_buffer(tokenizer_json)
        except ValueError as error:
            raise TextError(
                f"tokenizer.json ({len(tokenizer_json)} bytes) cannot be read: {error}; "
                "download the file again"
            ) from error
        return Tokenizer(tokenizer)

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, added ones included. The model's V may be padded beyond."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def n_ids(self) -> int:
        """One more than the largest id, which is more than vocab_size where ids are left out."""
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    @property
    def prefix(self) -> list[int]:
        """The ids that encode puts in front of a text with add_special: a BOS token, or none."""
        plain, whole = (self.encode("a", add_special=special) for special in (False, True))
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return whole[:start]
        return []  # the model expects another spelling at the beginning, not tokens in front

    @property
    def added_tokens(self) -> Mapping[str, bool]:
        """Each token that is matched whole in text, and whether decoding leaves it out."""
        return {token.content: token.special for token in self._added.values()}

    @property
    def decoder(self) -> Mapping[str, Any] | None:
        """How tokens are put together to text, as tokenizer.json says it."""
        decoder = self._tokenizer.decoder
        return None if decoder is None else json.loads(decoder.__getstate__())

    def token_id(self, token: str) -> int | None:
        """Give the id of a token spelled as in tokenizer.json, or None if there is none."""
        return self._tokenizer.token_to_id(token)

    def token(self, token_id: int) -> str | None:
        """Spell a token as in tokenizer.json, or None if there is none of this id."""
        return self._tokenizer.id_to_token(token_id)

    def is_silent(self, token_id: int) -> bool:
        """Say whether decoding leaves this token out: a special one, or one of V's padding."""
        added = self._added.get(token_id)
        if added is not None:
            return added.special
        return self._tokenizer.id_to_token(token_id) is None

    def encode(self, text: str, *, add_special: bool) -> list[int]:
        """Give text's token ids. Added tokens spelled out in text become those tokens.

        add_special: put what the model expects around a text (usually a BOS token in front).
        A chat template writes such tokens itself, so its output is encoded without; and what
        users wrote must not become tokens at all, which ChatTemplate.encode sees to.

        Raises PromptError if text is not Unicode.
        """
        require_unicode(text)
        return self._tokenizer.encode(text, add_special_tokens=add_special).ids

    def encode_continuation(self, text: str) -> list[int]:
        """Give the ids of text that follows other text; added tokens become those tokens.

        SentencePiece puts a space in front of what it takes for the beginning of a text. A line
        break in front keeps it from doing so, and is taken away again.
        """
        ids = self.encode("\n" + text, add_special=False)
        n_newline = len(self._newline_ids)
        if ids[:n_newline] == self._newline_ids:
            return ids[n_newline:]
        # The break merged with the text, as in byte-level BPE, which adds no space.
        return self.encode(text, add_special=False)

    def encode_plain(self, text: str) -> list[int]:
        """Give ids of text that follows other text, none of them an added token's.

        One character at a time: slow and not what the model was trained on, but certain. It is
        meant for the spelling of a control token in what a user wrote.
        """
        return [token_id for char in text for token_id in self.encode_continuation(char)]

    def decode(self, ids: Sequence[int]) -> str:
        """Give the text of these tokens, special ones left out."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)


class StreamingDetokenizer:
    """Turns tokens into text as they come, never half a character.

    What push and flush return, put together, is tokenizer.decode of all ids. One exception: when
    a run of byte-fallback tokens is not UTF-8, decode shows U+FFFD for all its bytes, also for
    those that came first and made characters; a stream cannot take these back.

    Each push decodes a window of the last few tokens only: those whose text was completed last,
    as context (a tokenizer may treat a text's first token differently), and those after them.
    """

    def __init__(self, tokenizer: Tokenizer, *, inside: bool = False) -> None:
        """inside: the text stands inside another, so that SentencePiece's first space is one."""
        self._tokenizer = tokenizer
        # Any word that comes before will do.
        self._window: list[int] = tokenizer.encode_continuation("a") if inside else []
        self._n_context = len(self._window)  # how many ids at the window's start are context
        self._said = tokenizer.decode(self._window)  # the part of its text that was returned

    def push(self, token_id: int) -> str:
        """Take the next token; give the text that it completes, often one word, maybe none."""
        if self._tokenizer.is_silent(token_id):
            return ""
        self._window.append(token_id)
        text = self._text()
        # What ends in U+FFFD may be unfinished: one for the character in byte-level BPE, one for
        # each byte of the run in SentencePiece's byte fallback.
        new = text.rstrip(_UNDECODABLE)[len(self._said) :]
        self._said += new
        if not text.endswith(_UNDECODABLE):
            self._slide()
        elif len(self._window) - self._n_context > MAX_WINDOW:
            new += self._cut()
        return new

    def flush(self) -> str:
        """Give what was held back, as the end of the text; afterwards begin a new text."""
        rest = self._text()[len(self._said) :]
        self._window, self._n_context, self._said = [], 0, ""
        return rest

    def _text(self) -> str:
        """Decode the window, without its context if that no longer decodes to what was said."""
        text = self._tokenizer.decode(self._window)
        if text.startswith(self._said):
            return text
        context = self._tokenizer.decode(self._window[: self._n_context])
        self._said = self._said.removeprefix(context)
        self._window = self._window[self._n_context :]
        self._n_context = 0
        return self._tokenizer.decode(self._window)

    def _slide(self) -> None:
        """Make the tokens that are now complete the context of the next."""
        self._window = self._window[self._n_context :]
        self._n_context = len(self._window)
        self._said = self._tokenizer.decode(self._window)

    def _cut(self) -> str:
        """Forget the front of a window that stays undecodable; give its text not yet returned."""
        halves = [
            (self._tokenizer.decode(self._window[:-n]), self._tokenizer.decode(self._window[-n:]))
            for n in range(1, MAX_UNFINISHED + 2)
        ]
        # A cut through a character turns it into several U+FFFD; the shortest text has none.
        lengths = [len(head) + len(tail) for head, tail in halves]
        n_kept = 1 + lengths.index(min(lengths))
        head, _ = halves[n_kept - 1]
        new = head[len(self._said) :]
        self._said = self._said[len(head) :]
        self._window, self._n_context = self._window[-n_kept:], 0
        return new


class StopText:
    """Ends a text before the first of some strings, however the text is cut into pieces.

    The first is the one that is complete first; of those complete at once, the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "SamplingOptions refuses empty stop strings"
        self._stops = tuple(stops)
        self._held = ""  # might be the beginning of a stop string
        self.found: str | None = None  # the one that ended the text

    def push(self, text: str) -> tuple[str, bool]:
        """Take the next piece; give what is certain to stay, and whether a stop was found."""
        if self.found is not None:
            return "", True
        text = self._held + text
        found = [
            (start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0
        ]
        if found:
            end, start = min(found)
            self._held, self.found = "", text[start:end]
            return text[:start], True
        n_held = self._longest_beginning(text)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held], False

    def flush(self) -> str:
        """Give what was held back: the text has ended, so it was no stop string."""
        held, self._held = self._held, ""
        return held

    def _longest_beginning(self, text: str) -> int:
        """Count the characters at text's end with which a stop string begins."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for n_chars in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-n_chars:]) for stop in self._stops):
                return n_chars
        return 0


def require_unicode(text: str) -> None:
    """Raise PromptError if text holds half a surrogate pair, as undecodable arguments do."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"character {error.start} of the text is U+{ord(text[error.start]):04X}, half a "
            "character, but a prompt must be Unicode; was it typed in another encoding?"
        ) from error
