"""A tiny random Mixtral checkpoint that can read and write: tokenizer, chat template and all.

Knows:        a vocabulary learned from the calibration text, a template of four control tokens.
Ignorant of:  what is tested with it.
"""

import json
import shutil
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.checkpoint.tiny_mixtral import config_with, write_tiny_mixtral

CONTROL_TOKENS = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
CONTEXT = 384
VOCABULARY = 320
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONFIG = config_with(
    vocab_size=VOCABULARY,
    intermediate_size=64,
    max_position_embeddings=CONTEXT,
    eos_token_id=0,
)


def learned_tokenizer() -> Tokenizer:
    """Byte-level BPE: every text can be written, so a random model's answers are readable too."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = (resources.files("lowmoe") / "loader" / "calibration.txt").read_text("utf-8")
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text[:20_000]], trainer)
    return tokenizer


def write_talking_mixtral(folder: Path) -> None:
    """A checkpoint in float32, so that transformers computes the very same weights."""
    write_tiny_mixtral(folder, CONFIG, dtype=torch.float32)
    learned_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')


def copy_of(folder: Path, to: Path, *, without: str | None = None) -> Path:
    """A copy for one test to spoil."""
    shutil.copytree(folder, to, ignore=None if without is None else shutil.ignore_patterns(without))
    return to


def change_json(path: Path, **changes: Any) -> Mapping[str, Any]:
    """Set keys of a JSON file; returns all of them."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps(values))
    return values
