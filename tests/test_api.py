"""The Python API does what the design shows, on a tiny model that transformers can check."""

import gc
import weakref
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

import lowmoe
from lowmoe.api import Model
from lowmoe.decoder.computation import Cache
from lowmoe.decoder.decoder import Decoder
from lowmoe.decoder.native import NativeComputation
from lowmoe.errors import (
    MemoryBudgetError,
    PromptError,
    TextError,
    UnknownModelError,
    UsageError,
)
from lowmoe.kernels import cpu
from tests.talking_mixtral import CONTEXT, VOCABULARY, change_json, copy_of

PROMPT = "Once upon a time"
QUESTION = [{"role": "user", "content": "Who is there?"}]


def greedy(model: Model, prompt: lowmoe.api.Prompt = PROMPT, n: int = 24) -> list[int]:
    tokens = model.stream(prompt, temperature=0.0, max_new_tokens=n)
    return [token.id for token in tokens if token.id is not None]


@pytest.fixture
def unquantized(talking_checkpoint: Path) -> Iterator[Model]:
    with lowmoe.load(talking_checkpoint, dtype="float32", gpu="none") as model:
        yield model


# --- load


def test_every_option_of_load_is_taken(model_folder: Path) -> None:
    with lowmoe.load(
        str(model_folder),
        gpu="none",
        bits=4,
        ram="90%",
        vram=None,
        threads=2,
        context=100,
        kv="int8",
        sequences=3,
    ) as model:
        runtime = model.runtime
        assert (runtime.bits, runtime.n_context, runtime.n_sequences) == (4, 100, 3)
        assert runtime.pool is not None
        assert runtime.pool.n_threads == 2
        # Two layers of 2 key-value heads of 16 int8 numbers and a scale, in pages of 256 tokens.
        assert runtime.decoder.computation.cache_bytes(100) == 2 * 2 * 2 * (16 + 4) * 256
        assert greedy(model, n=3)


@pytest.mark.parametrize(("dtype", "bits"), [("float32", 32), ("bfloat16", 16), ("float16", 16)])
def test_a_checkpoint_runs_unquantized(talking_checkpoint: Path, dtype: str, bits: int) -> None:
    with lowmoe.load(talking_checkpoint, dtype=dtype) as model:
        assert model.runtime.bits == bits
        assert len(greedy(model, n=3)) == 3


def test_dtype_is_refused_for_a_quantized_folder(model_folder: Path) -> None:
    with pytest.raises(UsageError, match=r"dtype runs a checkpoint .* but .* is none"):
        lowmoe.load(model_folder, dtype="float32")


def test_dtype_and_bits_exclude_each_other(talking_checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="dtype runs unquantized weights, but bits is 4"):
        lowmoe.load(talking_checkpoint, dtype="float32", bits=4)


def test_without_a_name_the_demo_is_loaded() -> None:
    with lowmoe.load(bits=2, context=16) as model:
        assert model.runtime.spec.n_vocab == 8192


def test_a_checkpoint_is_quantized_into_the_home_once(talking_checkpoint: Path, home: Path) -> None:
    class Heard:
        def __init__(self) -> None:
            self.stages: list[str] = []

        def step(self, stage: str, done: int, total: int, unit: str) -> None:
            self.stages.append(stage)

        def note(self, text: str) -> None:
            self.stages.append(text)

    first, second = Heard(), Heard()
    with lowmoe.load(talking_checkpoint, bits=2, threads=1, report=first) as model:
        answer = greedy(model)
    with lowmoe.load(talking_checkpoint, bits=2, threads=1, report=second) as model:
        assert greedy(model) == answer
    made, expected, *steps = first.stages
    assert f"quantized once, trellis at 2 bits, into {home}" in made
    assert "tokens/s are expected" in expected
    assert set(steps) == {"quantize"}
    assert second.stages == []


def test_a_model_nobody_knows_is_an_unknown_model_error(home: Path) -> None:
    with pytest.raises(UnknownModelError, match="Did you mean mixtral-8x7b"):
        lowmoe.load("mixtral-8x7")


# --- logits


def reference_logits(checkpoint: Path, ids: list[int]) -> Tensor:
    from transformers import MixtralForCausalLM

    reference = MixtralForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.inference_mode():
        logits: Tensor = reference(torch.tensor([ids])).logits[0]
        return logits


def test_logits_are_those_of_transformers(unquantized: Model, talking_checkpoint: Path) -> None:
    ids = torch.randint(VOCABULARY, (300,), generator=torch.Generator().manual_seed(3)).tolist()
    wanted = reference_logits(talking_checkpoint, ids)

    found = unquantized.logits(ids)  # 300 tokens are two chunks of prefill

    assert found.shape == (300, VOCABULARY)
    assert found.dtype == torch.float32
    # Both sum up 64 float32 products in orders of their own, some twenty times in a row.
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


def test_logits_do_not_depend_on_what_was_asked_before(model: Model) -> None:
    fresh = model.logits([5, 6, 7])
    greedy(model)
    assert torch.equal(model.logits([5, 6, 7]), fresh)


@pytest.mark.parametrize(
    ("ids", "complaint"),
    [
        ([], "no token ids were given"),
        ([VOCABULARY], f"token id {VOCABULARY}, but the vocabulary has ids 0 to {VOCABULARY - 1}"),
        ([-1], "token id -1"),
        ([1] * (CONTEXT + 1), f"{CONTEXT + 1} tokens, but the context holds {CONTEXT}"),
    ],
    ids=["none", "too large", "negative", "too many"],
)
def test_ids_that_cannot_be_scored_are_a_prompt_error(
    model: Model, ids: list[int], complaint: str
) -> None:
    with pytest.raises(PromptError, match=complaint):
        model.logits(ids)


def test_a_model_without_a_tokenizer_computes_and_only_text_complains(
    mute_checkpoint: Path, tmp_path: Path
) -> None:
    lowmoe.quantize(mute_checkpoint, tmp_path / "mute", bits=2, calibrate=False)
    for path, dtype in ((tmp_path / "mute", None), (mute_checkpoint, "float32")):
        with lowmoe.load(path, dtype=dtype) as model:
            assert model.logits([1, 2, 3]).shape == (3, VOCABULARY)
            with pytest.raises(TextError, match=r"this model has no tokenizer\.json"):
                model.generate(PROMPT)


# --- generate and stream


def test_generate_is_the_text_of_stream(model: Model) -> None:
    streamed = "".join(t.text for t in model.stream(PROMPT, temperature=0.0, max_new_tokens=24))
    assert model.generate(PROMPT, temperature=0.0, max_new_tokens=24) == streamed
    assert streamed


def test_the_answer_to_messages_is_that_to_the_text_the_template_makes(model: Model) -> None:
    text = "<|user|>Who is there?<|end|><|assistant|>"
    assert greedy(model, QUESTION) == greedy(model, text)


def test_greedy_tokens_are_those_of_the_logits(unquantized: Model) -> None:
    ids = unquantized.runtime.text.encode(PROMPT)
    for token_id in greedy(unquantized, n=10):
        assert int(unquantized.logits(ids)[-1].argmax()) == token_id
        ids.append(token_id)


def test_the_same_seed_gives_the_same_text_and_another_seed_another(model: Model) -> None:
    def text(seed: int) -> str:
        return model.generate(PROMPT, temperature=1.0, seed=seed, max_new_tokens=24)

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_tokens_are_the_same_whatever_the_ram(model_folder: Path) -> None:
    with lowmoe.load(model_folder) as model:
        runtime = model.runtime
        expert, n_experts = runtime.store.expert_bytes, runtime.spec.n_experts_total
        wanted = greedy(model, n=48)
    with pytest.raises(MemoryBudgetError, match=f"two of {expert} bytes must fit"):
        lowmoe.load(model_folder, bits=6, ram=1)
    spare = ram_beside_experts(model_folder)
    for n_slots in (2, 3, 5, n_experts):
        with lowmoe.load(model_folder, bits=6, ram=spare + n_slots * expert) as model:
            assert model.runtime.store.n_slots == n_slots
            assert greedy(model, n=48) == wanted
            assert model.statistics().hit_rate.disk > 0
            assert model.runtime.store.resident_bytes <= n_slots * expert


def ram_beside_experts(folder: Path) -> int:
    """Bytes of --ram that go to everything but experts, as the refusal of too small a budget says:
    so much more than 1 byte makes room for two.
    """
    with pytest.raises(MemoryBudgetError) as refused:
        lowmoe.load(folder, bits=6, ram=1)
    words = str(refused.value).split()
    two_experts = 2 * int(words[words.index("two") + 2])
    return 1 + int(words[words.index("least") + 1]) - two_experts


def test_auto_takes_the_widest_planes_whose_experts_all_fit(model_folder: Path) -> None:
    with lowmoe.load(model_folder, bits=4) as model:
        four_bits = model.runtime.store.expert_bytes * model.runtime.spec.n_experts_total
    spare = ram_beside_experts(model_folder)
    for ram, bits in ((spare + four_bits, 4), (spare + four_bits - 1, 2), ("90%", 6)):
        with lowmoe.load(model_folder, ram=ram) as model:
            assert model.runtime.bits == bits


# --- conversations


def test_a_second_turn_reuses_the_cache_and_is_scored_as_in_a_fresh_session(
    model_folder: Path, passes: list[int]
) -> None:
    with lowmoe.load(model_folder) as model:
        said = model.generate(QUESTION, temperature=0.0, max_new_tokens=12)
        n_first = sum(passes)
        turns = [*QUESTION, {"role": "assistant", "content": said}]
        turns.append({"role": "user", "content": "And then?"})
        ids = model.runtime.text.encode(turns)
        passes.clear()
        reused = next_scores(model, ids)
        n_read = sum(passes)
    with lowmoe.load(model_folder) as fresh:
        passes.clear()
        wanted = next_scores(fresh, ids)
        assert sum(passes) == len(ids)
    # What was said is spelled anew, so that not all of its 12 tokens need to be the same.
    assert n_read < len(ids) - n_first + 12
    # Tokens one by one and many at once are rounded otherwise; decoder/native_goldens.py derives
    # 1.3e-3 for each of the two in two layers, and up to 30 times that on the worst of many tokens.
    assert (reused - wanted).square().sum() < 30 * 2.6e-3 * wanted.square().sum()


def next_scores(model: Model, ids: list[int]) -> Tensor:
    """The logits that an answer to a prompt begins with, [V], its cache left as an answer does."""
    session = model.session
    assert session is not None
    n_kept = session.rewind(ids[:-1])
    for _ in session.forward(ids[n_kept:-1]):
        pass
    (hidden,) = session.forward(ids[-1:])
    return model.runtime.decoder.logits(hidden)[0]


def test_a_conversation_is_not_read_again_to_its_last_token(
    model: Model, passes: list[int]
) -> None:
    answer = greedy(model)
    passes.clear()
    assert greedy(model) == answer
    assert passes[0] == 1


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each pass through the decoder takes."""
    found: list[int] = []
    forward = Decoder.forward

    def counted(self: Decoder, ids: Tensor, cache: Cache) -> Tensor:
        found.append(len(ids))
        return forward(self, ids, cache)

    monkeypatch.setattr(Decoder, "forward", counted)
    return found


# --- several prompts

PROMPTS = ["Once upon a time", "The end", "Who is there? And who is here?", "a"]


@pytest.mark.parametrize("sequences", [1, 2, 4, 8])
def test_a_list_of_prompts_has_the_answers_that_each_has_alone(
    model: Model, model_folder: Path, sequences: int
) -> None:
    wanted = [model.generate(p, temperature=0.0, max_new_tokens=9) for p in PROMPTS]
    with lowmoe.load(model_folder, sequences=sequences) as several:
        assert several.generate(PROMPTS, temperature=0.0, max_new_tokens=9) == wanted
    assert len(set(wanted)) > 1


def test_a_list_may_be_of_chats_and_may_be_empty(model: Model) -> None:
    alone = model.generate(QUESTION, temperature=0.0, max_new_tokens=9)
    assert model.generate([QUESTION], temperature=0.0, max_new_tokens=9) == [alone]
    other = [{"role": "user", "content": "Once upon a time"}]
    both = model.generate([QUESTION, other], temperature=0.0, max_new_tokens=9)
    assert both[0] == alone
    with pytest.raises(PromptError, match="the prompt is empty"):
        model.generate([])
    with pytest.raises(PromptError, match="the prompt is empty"):
        model.generate(["a", " "])


def test_each_of_several_has_its_own_options(model_folder: Path) -> None:
    with lowmoe.load(model_folder, sequences=3) as model:
        options = [
            model.options(temperature=0.0, max_new_tokens=3),
            model.options(temperature=1.2, seed=7, max_new_tokens=12),
            model.options(temperature=0.0, max_new_tokens=6),
        ]
        found: list[list[lowmoe.Token]] = [[], [], []]
        for index, token in model.stream_all(PROMPTS[:3], options):
            found[index].append(token)
        wanted = [
            list(model.stream_with(prompt, of_prompt))
            for prompt, of_prompt in zip(PROMPTS, options, strict=False)
        ]
        assert found == wanted
        with pytest.raises(UsageError, match="2 prompts, but 3 sampling options"):
            model.stream_all(PROMPTS[:2], options)


def test_stop_ends_all_of_several(model_folder: Path) -> None:
    with lowmoe.load(model_folder, sequences=2) as model:
        options = [model.options(temperature=0.0, max_new_tokens=50)] * 4
        n_tokens = 0
        for _ in model.stream_all(PROMPTS, options):
            n_tokens += 1
            model.stop()
        assert n_tokens < 8  # the tokens of one step, and text that was held back
        assert model.session is not None
        assert model.session.batch.n_free == 2


def test_two_streams_may_be_taken_in_turns_where_there_is_room(model_folder: Path) -> None:
    with lowmoe.load(model_folder, sequences=2) as model:
        wanted = [greedy(model, prompt, 12) for prompt in PROMPTS[:2]]
        streams = [
            model.stream(prompt, temperature=0.0, max_new_tokens=12) for prompt in PROMPTS[:2]
        ]
        found: list[list[int]] = [[], []]
        for pair in zip_longest(*streams):
            for ids, token in zip(found, pair, strict=True):
                if token is not None and token.id is not None:
                    ids.append(token.id)
        assert found == wanted


# --- the end of an answer


def test_max_new_tokens_is_kept(model: Model) -> None:
    for n in (1, 2, 7):
        assert len(greedy(model, n=n)) == n
        assert model.statistics().new_tokens == n


def test_the_last_token_is_not_run_through_the_model_for_nothing(model: Model) -> None:
    layers = model.runtime.spec.layers
    greedy(model, n=2)  # what read-ahead guessed is in RAM
    before = model.runtime.store.traffic()
    greedy(model, n=5)
    lent = model.runtime.store.traffic() - before
    # The prompt's last token, then 4 tokens of the 5, each to 2 experts a layer.
    assert lent.ram_requests + lent.disk_requests == 5 * 2 * len(layers)


def test_a_stop_string_ends_the_answer_before_it(model: Model) -> None:
    whole = model.generate(PROMPT, temperature=0.0, max_new_tokens=60)
    stop = whole[20:23]
    cut = model.generate(PROMPT, temperature=0.0, max_new_tokens=60, stop=[stop])
    assert cut == whole[: whole.index(stop)]


def test_a_stop_string_that_never_comes_changes_nothing(model: Model) -> None:
    whole = model.generate(PROMPT, temperature=0.0, max_new_tokens=30)
    almost = whole[-1] + "§"  # held back to the end
    assert model.generate(PROMPT, temperature=0.0, max_new_tokens=30, stop=[almost]) == whole


def test_an_end_token_ends_the_answer_and_is_not_said(
    model: Model, talking_checkpoint: Path, tmp_path: Path
) -> None:
    with lowmoe.load(talking_checkpoint, dtype="float32") as model:
        ids = greedy(model, n=40)
    end = ids[15]
    folder = copy_of(talking_checkpoint, tmp_path / "ending")
    change_json_of_new(folder / "generation_config.json", eos_token_id=[end])
    with lowmoe.load(folder, dtype="float32") as model:
        assert greedy(model, n=40) == ids[: ids.index(end)]


def change_json_of_new(path: Path, **values: object) -> None:
    path.write_text("{}")
    change_json(path, **values)


def test_an_answer_ends_where_the_context_is_full(model_folder: Path) -> None:
    with lowmoe.load(model_folder, context=40) as model:
        n_prompt = len(model.runtime.text.encode(PROMPT))
        assert len(greedy(model, n=200)) == 40 - n_prompt
        with pytest.raises(PromptError, match="but the context holds 40"):
            model.stream(PROMPT * 20)
        assert len(greedy(model, n=200)) == 40 - n_prompt


def test_the_models_recommendations_are_taken_unless_told_otherwise(
    talking_checkpoint: Path, tmp_path: Path
) -> None:
    folder = copy_of(talking_checkpoint, tmp_path / "recommending")
    change_json_of_new(folder / "generation_config.json", do_sample=False, max_new_tokens=5)
    with lowmoe.load(folder, dtype="float32") as model:
        assert model.options().temperature == 0.0
        assert len(list(model.stream(PROMPT))) == 5
        assert len(greedy(model, n=7)) == 7


# --- interruptions


def test_stop_ends_the_answer_within_one_token(model: Model) -> None:
    seen = []
    for token in model.stream(PROMPT, temperature=0.0, max_new_tokens=50):
        seen.append(token.id)
        if len(seen) == 3:
            model.stop()
    assert len(seen) <= 4
    assert greedy(model)[:3] == seen[:3]


def test_a_stop_before_the_answer_does_not_end_it(model: Model) -> None:
    model.stop()
    assert len(greedy(model, n=5)) == 5


def test_an_answer_that_is_abandoned_leaves_the_model_usable(model: Model) -> None:
    wanted = greedy(model)
    for token in model.stream(PROMPT + ", not far from here", temperature=0.0):
        assert token.text is not None
        break
    assert greedy(model) == wanted


def test_an_exception_in_mid_answer_leaves_the_model_usable(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = greedy(model)
    calls = 0
    run_layers = NativeComputation.run_layers

    def failing(*args: object) -> Tensor:
        nonlocal calls
        calls += 1
        x = run_layers(*args)  # type: ignore[arg-type]
        if calls == 4:  # a token in the middle, whose keys and values are in the cache
            raise MemoryError("thrown by the test")
        return x

    with monkeypatch.context() as patch:
        patch.setattr(NativeComputation, "run_layers", failing)
        with pytest.raises(MemoryError, match="thrown by the test"):
            greedy(model)
    assert calls == 4
    assert greedy(model) == wanted


def test_an_answer_cannot_go_on_once_the_model_was_asked_something_else(model: Model) -> None:
    first = model.stream(PROMPT, temperature=0.0)
    next(first)
    model.logits([1, 2, 3])
    with pytest.raises(UsageError, match="asked something else since it began"):
        list(first)


def test_what_cannot_be_answered_is_said_at_once(model: Model) -> None:
    for prompt, complaint in (
        ("", "the prompt is empty"),
        (" \n", "the prompt is empty"),
        ([], "the prompt is empty"),
        ("word " * CONTEXT, "must leave room for an answer"),
        ("\ud800", "half a character"),
    ):
        with pytest.raises(PromptError, match=complaint):
            model.stream(prompt)


# --- statistics and close


def test_statistics_are_asked_for_too_early(model: Model) -> None:
    with pytest.raises(UsageError, match="nothing has been generated yet"):
        model.statistics()


def n_threads() -> int:
    """Those of this process, native ones among them."""
    return psutil.Process().num_threads()


def test_a_closed_model_says_so_and_gives_its_memory_back(model_folder: Path) -> None:
    gc.collect()
    before = (cpu.allocated_bytes(), n_threads())
    model = lowmoe.load(model_folder, threads=3)
    greedy(model)
    assert cpu.allocated_bytes() > before[0]
    assert n_threads() > before[1]
    store = weakref.ref(model.runtime.store)
    model.close()
    model.close()
    gc.collect()
    assert store() is None
    assert (cpu.allocated_bytes(), n_threads()) == before
    model.stop()  # a late Ctrl-C
    for ask in (lambda: model.stream(PROMPT), lambda: model.logits([1]), model.statistics):
        with pytest.raises(UsageError, match="the model is closed"):
            ask()


def test_a_stream_of_a_model_that_was_closed_says_so(model_folder: Path) -> None:
    model = lowmoe.load(model_folder, threads=1)
    stream = model.stream(PROMPT, temperature=0.0, max_new_tokens=20)
    next(stream)
    model.close()
    with pytest.raises(UsageError, match="the model is closed"):
        list(stream)


# --- quantize


def test_quantize_goes_on_with_a_finished_folder_without_touching_it(
    talking_checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "twice"
    lowmoe.quantize(talking_checkpoint, folder, bits=2, calibrate=False)
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}
    lowmoe.quantize(str(talking_checkpoint), str(folder), bits=2, calibrate=False)
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["twice"]


@pytest.mark.parametrize("format", ["trellis", "nf4", "bf16", "fp16", "fp32"])
def test_every_format_is_close_to_the_checkpoint(
    talking_checkpoint: Path, unquantized: Model, tmp_path: Path, format: str
) -> None:
    lowmoe.quantize(talking_checkpoint, tmp_path / "model", format=format, calibrate=False)
    ids = list(range(4, 60))
    wanted = unquantized.logits(ids)
    with lowmoe.load(tmp_path / "model") as model:
        found = model.logits(ids)
    error = (found - wanted).norm() / wanted.norm()
    # 4 bits lose about a tenth of the weights' norm, half precision a thousandth; a random model
    # adds some up over two layers. Another model's logits would be off by 1.4.
    limit = {"trellis": 0.4, "nf4": 0.4, "bf16": 0.03, "fp16": 0.005, "fp32": 1e-5}[format]
    assert error < limit
