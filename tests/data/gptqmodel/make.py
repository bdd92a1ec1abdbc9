"""Writes the checkpoints of this folder with gptqmodel, on a CPU: python make.py

Needs gptqmodel 7.7.0 and what it needs, too much for the test extra; hence the files are kept. On a
machine of two cores it starts once "model_loader:cpu" in its __init__.py asks for one worker.

What is expected of a reader is computed by others: `codes.json` has a hash of each weight as
gptqmodel's own modules dequantize it, `logits.safetensors` what transformers computes with those.
"""

import json
import random
import shutil
from pathlib import Path

import torch
import xxhash
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.quantization import FORMAT, METHOD
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig

HERE = Path(__file__).parent
GROUP, VOCABULARY = 32, 48
KINDS = {
    "gptq-4bit-reordered": QuantizeConfig(
        bits=4, group_size=GROUP, desc_act=True, sym=True, format=FORMAT.GPTQ
    ),
    "gptq-4bit-asymmetric-v2": QuantizeConfig(
        bits=4, group_size=GROUP, desc_act=False, sym=False, format=FORMAT.GPTQ_V2
    ),
    "gptq-4bit-asymmetric": QuantizeConfig(
        bits=4,
        group_size=-1,
        desc_act=False,
        act_group_aware=False,
        sym=False,
        format=FORMAT.GPTQ,
    ),
    "gptq-8bit": QuantizeConfig(
        bits=8, group_size=GROUP, desc_act=False, sym=True, format=FORMAT.GPTQ
    ),
    "awq": QuantizeConfig(
        bits=4, group_size=GROUP, method=METHOD.AWQ, format=FORMAT.GEMM, sym=False
    ),
}


def write_source(folder: Path) -> None:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=128,
        norm_topk_prob=True,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    for weight in model.parameters():
        with torch.no_grad():
            _ = weight.normal_(0, 0.15) if weight.dim() > 1 else weight.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1")
    tokenizer.save_pretrained(folder)


def quantize(source: Path, folder: Path, config: QuantizeConfig) -> None:
    random.seed(0)
    texts = [[random.randrange(VOCABULARY) for _ in range(64)] for _ in range(32)]
    model = GPTQModel.load(str(source), config)
    model.quantize([{"input_ids": t, "attention_mask": [1] * 64} for t in texts], batch_size=4)
    model.save(str(folder))


def dequantized(folder: Path) -> dict[str, torch.Tensor]:
    """Every weight by its plain name, float32."""
    stored = load_file(folder / "model.safetensors")
    backend = BACKEND.AUTO if folder.name == "awq" else BACKEND.TORCH
    loaded = GPTQModel.load(str(folder), backend=backend, device="cpu").model
    found = {}
    for name, module in loaded.named_modules():
        if not hasattr(module, "qweight"):
            continue
        module.scales.data = stored[f"{name}.scales"].float()  # else rounded to the model's dtype
        module.dequant_dtype = torch.int32
        if folder.name == "awq":
            weight = dequantize_gemm(module.qweight, module.qzeros, module.scales, 4, GROUP)
        else:
            weight = module.dequantize_weight()
        found[f"{name}.weight"] = weight.T.float().contiguous()
    packed = ("qweight", "qzeros", "scales", "g_idx")
    return found | {n: t.float() for n, t in stored.items() if not n.endswith(packed)}


def write_expected(folder: Path) -> None:
    weights = dequantized(folder)
    hashes = {n: xxhash.xxh3_64_hexdigest(t.numpy().tobytes()) for n, t in sorted(weights.items())}
    (folder / "codes.json").write_text(json.dumps(hashes, indent=1) + "\n")
    plain = folder / "plain"
    plain.mkdir()
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config))
    save_file(weights, plain / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    ids = torch.randint(0, VOCABULARY, (24,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(ids[None], use_cache=False).logits[0]
    save_file({"ids": ids, "logits": logits.contiguous()}, folder / "logits.safetensors")
    shutil.rmtree(plain)


if __name__ == "__main__":
    source = HERE / "source"
    write_source(source)
    for kind, config in KINDS.items():
        shutil.rmtree(HERE / kind, ignore_errors=True)
        quantize(source, HERE / kind, config)
        write_expected(HERE / kind)
        for path in (HERE / kind).iterdir():
            if path.name not in (
                "config.json", "model.safetensors", "codes.json", "logits.safetensors"
            ):  # fmt: skip
                path.unlink()
    shutil.rmtree(source)
    shutil.rmtree("logs", ignore_errors=True)
