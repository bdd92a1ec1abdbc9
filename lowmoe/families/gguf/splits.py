"""How vocabularies of byte pairs cut a text into words before they merge: patterns by kind.

Where llama.cpp changed a pattern for the sake of its own regular expressions, this is the one that
the model's makers wrote. Patterns are used one after the other, each on what the others left.

Source: llama.cpp's src/llama-vocab.cpp and the tokenizer.json of models that it names.

Knows:        llama.cpp's names of kinds (tokenizer.ggml.pre).
Ignorant of:  vocabularies and merges.
"""

from collections.abc import Mapping
from dataclasses import dataclass

_CONTRACTED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = rf"{_CONTRACTED}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_SIGNS = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_BY_ONE = rf"{_WORDS}|\p{{N}}|{_SIGNS}"  # digit by digit
_BY_THREE = rf"{_WORDS}|\p{{N}}{{1,3}}|{_SIGNS}"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"


def _cased(contracted: str, digits: str) -> str:
    """Words that end where small letters become capitals."""
    front = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{front}[{_UPPER}]*[{_LOWER}]+{contracted}|{front}[{_UPPER}]+[{_LOWER}]*{contracted}"
        rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


_GPT4O = _cased(f"{_CONTRACTED}?", r"\p{N}{1,3}")
_TEKKEN = _cased("", r"\p{N}")
_HAN = r"[^\r\n\p{L}\p{N}]?"
_KIMI = (
    rf"[\p{{Han}}]+|{_HAN}[{_UPPER}&&[^\p{{Han}}]]*[{_LOWER}&&[^\p{{Han}}]]+{_CONTRACTED}?"
    rf"|{_HAN}[{_UPPER}&&[^\p{{Han}}]]+[{_LOWER}&&[^\p{{Han}}]]*{_CONTRACTED}?"
    rf"|\p{{N}}{{1,3}}|{_SIGNS}"
)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|" + _SPACES,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """patterns: of words; whole_words: one that is in the vocabulary is not put together by merges;
    begins: whether texts begin with a BOS token where the file does not say."""

    patterns: tuple[str, ...]
    whole_words: bool = False
    begins: bool = False


_LLAMA3 = Split(patterns=(_BY_THREE,), whole_words=True, begins=True)
_OF_THREE = Split(patterns=(_BY_THREE,))
_OF_ONE = Split(patterns=(_BY_ONE,))
_OLD = Split(patterns=(_GPT2,))
_SINGLE_DIGITS = Split(patterns=(r"\p{N}", _GPT2))
_CASED = Split(patterns=(_GPT4O,))

SPLITS: Mapping[str, Split] = {
    "chatglm-bpe": _OF_THREE,
    "dbrx": _OF_THREE,
    "deepseek-r1-qwen": _OF_ONE,
    "deepseek-v3": Split(patterns=_DEEPSEEK3),
    "falcon3": _LLAMA3,
    "glm4": Split(patterns=(_BY_THREE,), whole_words=True),
    "gpt-2": _OLD,
    "gpt-4o": _CASED,
    "granite-docling": _OLD,
    "grok-2": _OF_ONE,
    "hunyuan": _OF_ONE,
    "kimi-k2": Split(patterns=(_KIMI,)),
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "llama4": _CASED,
    "minimax-m2": _CASED,
    "mpt": _OLD,
    "olmo": _OLD,
    "phi-2": _OLD,
    "qwen2": _OF_ONE,
    "refact": _SINGLE_DIGITS,
    "smaug-bpe": _OF_THREE,
    "smollm": _SINGLE_DIGITS,
    "starcoder": _SINGLE_DIGITS,
    "tekken": Split(patterns=(_TEKKEN,), whole_words=True, begins=True),
}
