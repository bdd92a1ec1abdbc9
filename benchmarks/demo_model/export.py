"""A checkpoint of training as a Hugging Face folder, and such a folder as a model again.

    python -m benchmarks.demo_model.export CHECKPOINT.pt TOKENIZER.json OUT

Knows:        how transformers names a Mixtral's tensors, and what lies beside them in a folder.
Ignorant of:  training.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.demo_model.documents import END_OF_TEXT, IM_END, PAD
from benchmarks.demo_model.mixtral import Mixtral
from benchmarks.demo_model.shape import Shape

TRAINING = "training.json"
CHAT_TEMPLATE = """{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
GENERATION = {
    "bos_token_id": None,
    "eos_token_id": [END_OF_TEXT, IM_END],
    "pad_token_id": PAD,
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.9,
    "max_new_tokens": 960,
}


def tokenizer_config(shape: Shape) -> dict[str, object]:
    """tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|pad|>",
        "bos_token": None,
        "model_max_length": shape.context,
        "clean_up_tokenization_spaces": False,
    }


def to_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by transformers' names, experts apart."""
    found = {}
    for name, p in state.items():
        stem, _, last = f"model.{name}".rpartition(".")
        if last == "w13":
            for expert, both in enumerate(p):
                w1, w3 = both.chunk(2)
                found[f"{stem}.experts.{expert}.w1.weight"] = w1.clone()
                found[f"{stem}.experts.{expert}.w3.weight"] = w3.clone()
        elif last == "w2":
            for expert, down in enumerate(p):
                found[f"{stem}.experts.{expert}.w2.weight"] = down.clone()
        else:
            found[f"model.{name}"] = p.clone()
    return found


def from_hugging_face(tensors: dict[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """The inverse, in float32."""
    found = {}
    for name in Mixtral(shape).state_dict():
        stem, _, last = f"model.{name}".rpartition(".")
        experts = [f"{stem}.experts.{expert}" for expert in range(shape.n_experts)]
        if last == "w13":
            both = [(tensors[f"{e}.w1.weight"], tensors[f"{e}.w3.weight"]) for e in experts]
            found[name] = torch.stack([torch.cat(pair) for pair in both]).float()
        elif last == "w2":
            found[name] = torch.stack([tensors[f"{e}.w2.weight"] for e in experts]).float()
        else:
            found[name] = tensors[f"model.{name}"].float()
    return found


def tokens_of(checkpoint: Path) -> int:
    """How many tokens a training checkpoint has learnt from."""
    saved = torch.load(checkpoint, weights_only=True, mmap=True)
    return saved["position"]["step"] * saved["options"]["step_tokens"]


def load_trained(path: Path) -> Mixtral:
    """The model of a training checkpoint, or of a Hugging Face folder of the demo's shape."""
    if path.is_dir():
        config = json.loads((path / "config.json").read_text("utf-8"))
        shape = Shape(context=config["max_position_embeddings"])
        state = from_hugging_face(load_file(path / "model.safetensors"), shape)
    else:
        saved = torch.load(path, weights_only=True, mmap=True)
        shape, state = Shape(**saved["shape"]), saved["model"]
    model = Mixtral(shape)
    model.load_state_dict(state)
    return model


def export(model: Mixtral, tokenizer: Path, out: Path, *, tokens: int) -> None:
    """Write a folder that transformers and lowmoe load; weights in bfloat16.

    tokens: it has learnt from, which training.json keeps for its card.
    """
    out.mkdir(parents=True, exist_ok=True)
    tensors = to_hugging_face({n: p.bfloat16() for n, p in model.state_dict().items()})
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    texts = {
        "config.json": model.shape.config(),
        "generation_config.json": GENERATION,
        "tokenizer_config.json": tokenizer_config(model.shape),
        TRAINING: {"tokens": tokens},
    }
    for name, content in texts.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    if tokenizer.resolve() != (out / "tokenizer.json").resolve():
        shutil.copyfile(tokenizer, out / "tokenizer.json")


def main() -> None:
    """Export one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    tokens = tokens_of(arguments.checkpoint)
    export(load_trained(arguments.checkpoint), arguments.tokenizer, arguments.out, tokens=tokens)


if __name__ == "__main__":
    main()
