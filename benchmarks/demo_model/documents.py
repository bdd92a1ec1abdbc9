"""Tokenized documents, and the order in which training reads them.

Knows:        which sets there are, how much of each an epoch holds, how a chat is written.
Ignorant of:  text, models.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from benchmarks.demo_model.asked import SETS as ASKED_SETS

END_OF_TEXT, IM_START, IM_END, PAD = 0, 1, 2, 3
Ids = NDArray[np.uint16]
Weights = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """How a set takes part: drawn anew in every epoch."""

    kept: float  # of its documents, in each epoch
    chat: float  # of those, framed as an answer; the others are bare text


ASKED_FOR = 4.0  # how much a token of a question counts where the answer first has it; others 1
ASKED_OTHERWISE = 0.85  # of chats: by any prompt of their text, else by the first


# Stories are what it is for. Scenes, questions and the rest teach it to answer what it is asked,
# and words that stories lack; a question's answer says little without the question.
MIXTURE = {
    "stories": Share(kept=1.0, chat=0.9),
    "fairy": Share(kept=1.0, chat=0.6),
    "simplebooks": Share(kept=1.0, chat=0.8),
    "summ": Share(kept=0.7, chat=0.9),
    "qa": Share(kept=0.5, chat=0.9),
    "scenes": Share(kept=0.5, chat=0.6),
    "reviews": Share(kept=0.3, chat=0.6),
    "podcast": Share(kept=0.1, chat=0.6),
}


@dataclass(frozen=True, slots=True)
class Documents:
    """Of each its n_prompts prompts, then its text.  ids: all tokens; ends: [(n_prompts + 1) N],
    exclusive.
    """

    ids: Ids
    ends: NDArray[np.int64]
    n_prompts: int

    @classmethod
    def of(
        cls, prompts: Sequence[Sequence[Sequence[int]]], texts: Sequence[Sequence[int]]
    ) -> "Documents":
        """From lists of ids; prompts: of each text several, of all texts as many."""
        parts = [p for of, text in zip(prompts, texts, strict=True) for p in (*of, text)]
        ids = np.array([i for part in parts for i in part], dtype=np.uint16)
        ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        return cls(ids, ends, len(prompts[0]))

    def __len__(self) -> int:
        return len(self.ends) // (self.n_prompts + 1)

    def prompt(self, index: int, which: int = 0) -> Ids:
        """One of its prompts."""
        return self._part(index * (self.n_prompts + 1) + which)

    def text(self, index: int) -> Ids:
        """Its tokens."""
        return self._part(index * (self.n_prompts + 1) + self.n_prompts)

    def _part(self, number: int) -> Ids:
        return self.ids[self.ends[number - 1] if number else 0 : self.ends[number]]


def save_documents(documents: Documents, path: Path) -> None:
    """Write a set."""
    n_prompts = np.array([documents.n_prompts])
    save_file({"ids": documents.ids, "ends": documents.ends, "n_prompts": n_prompts}, path)


def load_documents(path: Path) -> Documents:
    """Read a set."""
    arrays = load_file(path)
    return Documents(arrays["ids"], arrays["ends"], int(arrays["n_prompts"][0]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """The tokens around a chat's messages, which a tokenizer gives.

    asking: those that any question may have, whatever it asks for.
    """

    user: Sequence[int]  # of "user\n"
    assistant: Sequence[int]
    newline: Sequence[int]
    asking: Set[int] = frozenset()

    def chat(self, prompt: Ids, text: Ids) -> Ids:
        """A question and its answer in ChatML."""
        before = [*self.newline, IM_START, *self.assistant]
        parts = ([IM_START, *self.user], prompt, [IM_END], before, text, [IM_END, END_OF_TEXT])
        return np.concatenate([np.asarray(part, dtype=np.uint16) for part in parts])

    def weights(self, prompt: Ids, chat: Ids) -> Weights:
        """How much each token of a chat counts.

        What is asked for comes up first in a token or two of an answer of hundreds: counted as all
        others are, a small model learns all of a story's habits before it learns to look there.
        Where it comes again it counts as others do: else clocks strike and strike.
        """
        found = np.ones(len(chat), dtype=np.float32)
        begin = 1 + len(self.user) + len(prompt) + 1  # and the answer's own beginning:
        begin += len(self.newline) + 1 + len(self.assistant)
        text = chat[begin:]
        for token in set(prompt.tolist()) - self.asking:
            places = np.flatnonzero(text == token)
            found[begin + places[:1]] = ASKED_FOR
        return found

    @staticmethod
    def bare(text: Ids) -> Ids:
        """A text that ends."""
        return np.append(text, np.uint16(END_OF_TEXT))


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Documents, or pieces of some, behind each other."""

    ids: Ids  # [T]
    targets: Ids  # [T], what follows each
    lengths: list[int]  # T in all
    weights: Weights  # [T], how much each target counts

    def split(self, n_tokens: int) -> "list[Batch]":
        """In batches of whole documents, of at most n_tokens or one document."""
        groups: list[list[int]] = []
        for length in self.lengths:
            if groups and sum(groups[-1]) + length <= n_tokens:
                groups[-1].append(length)
            else:
                groups.append([length])
        ends = np.cumsum([sum(group) for group in groups])
        parts = zip(
            *(np.split(of, ends[:-1]) for of in (self.ids, self.targets, self.weights)), strict=True
        )
        return [
            Batch(ids=ids, targets=targets, lengths=group, weights=weights)
            for (ids, targets, weights), group in zip(parts, groups, strict=True)
        ]


class Epoch:
    """Everything once, in an order of its own; what is less than a step at its end is left out.

    A document longer than the context is cut into pieces. Batches are cut anywhere, so that all are
    of one size: the rest of a document that one cuts begins the next. What a question asks for
    counts more only where the question is in sight: elsewhere it could but be guessed.
    """

    def __init__(
        self, sets: Mapping[str, Documents], frame: Frame, *, context: int, number: int, seed: int
    ) -> None:
        rng, asking = (
            np.random.default_rng(seeds) for seeds in ((seed, number), (seed, number, 1))
        )
        pieces: list[tuple[Ids, Weights]] = []
        for name, share in MIXTURE.items():
            documents = sets[name]
            kept = rng.random(len(documents)) < share.kept
            chat = rng.random(len(documents)) < share.chat
            otherwise = asking.random(len(documents)) < ASKED_OTHERWISE
            others = asking.integers(documents.n_prompts, size=len(documents))
            for index in np.flatnonzero(kept):
                text = documents.text(index)
                prompt = documents.prompt(index, others[index] if otherwise[index] else 0)
                framed = frame.chat(prompt, text) if chat[index] else frame.bare(text)
                weights = np.ones(len(framed), dtype=np.float32)
                if chat[index] and name in ASKED_SETS:
                    weights[: context + 1] = frame.weights(prompt, framed)[: context + 1]
                # A piece's last token is the next one's first: every token but a text's first is
                # learnt once.
                cuts = range(0, len(framed) - 1, context)
                pieces += [
                    (framed[cut : cut + context + 1], weights[cut : cut + context + 1])
                    for cut in cuts
                ]
        pieces = [pieces[i] for i in rng.permutation(len(pieces))]
        self.ids = np.concatenate([ids[:-1] for ids, _ in pieces])
        self.targets = np.concatenate([ids[1:] for ids, _ in pieces])
        self.weights = np.concatenate([weights[1:] for _, weights in pieces])
        self.ends = np.cumsum([len(ids) - 1 for ids, _ in pieces])

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, first: int, n_tokens: int) -> Batch:
        """n_tokens of it."""
        end = first + n_tokens
        assert end <= len(self)
        within = self.ends[
            np.searchsorted(self.ends, first, "right") : np.searchsorted(self.ends, end)
        ]
        lengths = np.diff(np.concatenate([[first], within, [end]])).tolist()
        weights = self.weights[first:end].copy()
        if first and first not in self.ends:
            weights[: lengths[0]] = 1
        return Batch(
            ids=self.ids[first:end],
            targets=self.targets[first:end],
            lengths=lengths,
            weights=weights,
        )
