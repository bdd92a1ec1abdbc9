"""JSONL documents to tokens.    python -m benchmarks.demo_model.prepare DATA OUT --tokenizer FILE

DATA holds train/NAME.jsonl and heldout/NAME.jsonl, a {"prompt", "text"} a line.  OUT gets
tokenizer.json, and train and heldout of every set, whose tokens documents.py reads.

--train-tokenizer makes a new vocabulary of 8192 from DATA.  Losses a token of two models compare
only if they share one, so the demo model keeps its own: lowmoe/demo/tokenizer.json.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks.demo_model.asked import SETS, Nouns, kinds, questions
from benchmarks.demo_model.documents import Documents, save_documents
from benchmarks.demo_model.varied import varied

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
N_VOCAB = 8192
N_QUESTIONS = 8


def read_jsonl(path: Path) -> list[dict[str, str]]:
    """A file's documents."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def trained_tokenizer(files: list[Path]) -> Tokenizer:
    """Byte-level BPE; digits stand alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=N_VOCAB,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def texts() -> Iterator[str]:
        for file in files:
            for document in read_jsonl(file):
                yield from (document["prompt"], document["text"])

    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer


def encoded(path: Path, tokenizer: Tokenizer, n_questions: int) -> Documents:
    """A file's documents as tokens.  n_questions: beside its prompt, of what is a story, which is
    a varied one then.
    """
    documents = [(d["prompt"], d["text"]) for d in read_jsonl(path)]
    prompts = [[prompt] for prompt, _ in documents]
    if path.stem in SETS and n_questions:
        documents = [varied(*d) for d in documents]
        nouns = Nouns(text for _, text in documents)
        prompts = [
            [p, *islice(questions(p, text, kinds(path.stem, text), nouns), n_questions)]
            for p, text in documents
        ]

    def ids_of(texts: list[str]) -> list[list[int]]:
        return [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]

    return Documents.of([ids_of(asked) for asked in prompts], ids_of([t for _, t in documents]))


def main() -> None:
    """Tokenize all there is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--tokenizer", type=Path)
    source.add_argument("--train-tokenizer", action="store_true")
    arguments = parser.parse_args()
    files = sorted((arguments.data / "train").glob("*.jsonl"))
    if not files:
        raise SystemExit(
            f"{arguments.data}/train holds no *.jsonl. Put one there for each set; their "
            "sources are in benchmarks/demo_model/README.md."
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    destination = arguments.out / "tokenizer.json"
    if arguments.train_tokenizer:
        trained_tokenizer(files).save(str(destination))
    else:
        shutil.copyfile(arguments.tokenizer, destination)
    tokenizer = Tokenizer.from_file(str(destination))
    for part, n_questions in (("train", N_QUESTIONS), ("heldout", 0)):
        (arguments.out / part).mkdir(exist_ok=True)
        for file in sorted((arguments.data / part).glob("*.jsonl")):
            documents = encoded(file, tokenizer, n_questions)
            save_documents(documents, arguments.out / part / f"{file.stem}.safetensors")
            print(f"{part}/{file.stem}: {len(documents)} documents, {len(documents.ids)} tokens")


if __name__ == "__main__":
    main()
