"""Every model family, a line each; the only room that knows Hugging Face's names.

Knows:        which model_type is which family, what each calls its tensors.
Ignorant of:  what any of the tensors is for at run time.
"""

import functools
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

from lowmoe.errors import CheckpointError, UnsupportedModelError
from lowmoe.families import (
    dbrx,
    deepseek_v2,
    deepseek_v3,
    deepseek_v32,
    ernie4_5_moe,
    gpt2,
    gpt_oss,
    granitemoe,
    grok,
    grouped_sigmoid,
    hunyuan_v1_moe,
    llama,
    llama4,
    llama4_whole,
    minimax,
    minimax_m2,
    mistral,
    mixtral,
    olmoe,
    phimoe,
    qwen,
    qwen2,
    qwen3_5_moe,
    qwen3_5_moe_text,
    qwen3_next,
    qwen_moe,
    skywork,
)
from lowmoe.spec import (
    GatedDeltaNet,
    HfConfig,
    LatentAttention,
    LightningAttention,
    ModelSpec,
    Piece,
    Role,
    Stored,
    checkpoint_tensors,
)

FAMILIES: Mapping[str, ModuleType] = {
    "dbrx": dbrx,
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v3,
    "deepseek_v32": deepseek_v32,
    "dots1": grouped_sigmoid,
    "ernie4_5_moe": ernie4_5_moe,
    "glm4_moe": grouped_sigmoid,
    "glm4_moe_lite": deepseek_v3,
    "gpt2": gpt2,
    "gpt_oss": gpt_oss,
    "granitemoe": granitemoe,
    "grok-1": grok,
    "hunyuan_v1_moe": hunyuan_v1_moe,
    "kimi_k2": deepseek_v3,
    "llama": llama,
    "llama4": llama4_whole,
    "llama4_text": llama4,
    "minimax": minimax,
    "minimax_m1": minimax,
    "minimax_m2": minimax_m2,
    "minimax_text_01": minimax,
    "mistral": mistral,
    "mixtral": mixtral,
    "olmoe": olmoe,
    "phimoe": phimoe,
    "qwen": qwen,
    "qwen2": qwen2,
    "qwen2_moe": qwen_moe,
    "qwen3_5_moe": qwen3_5_moe,
    "qwen3_5_moe_text": qwen3_5_moe_text,
    "qwen3_moe": qwen_moe,
    "qwen3_next": qwen3_next,
    "skywork": skywork,
    "skywork_moe": skywork,
}

# Classes of checkpoints' own code that compute what a family here does; ours runs instead.
_KNOWN_CODE: Mapping[str, str] = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "dots1": "Dots1ForCausalLM",
    "ernie4_5_moe": "Ernie4_5_MoeForCausalLM",
    "grok-1": "Grok1ModelForCausalLM",
    "hunyuan_v1_moe": "HunYuanMoEV1ForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
    "minimax_m1": "MiniMaxM1ForCausalLM",
    "minimax_m2": "MiniMaxM2ForCausalLM",
    "minimax_text_01": "MiniMaxText01ForCausalLM",
    "phimoe": "PhiMoEForCausalLM",
    "qwen": "QWenLMHeadModel",
    "skywork": "SkyworkForCausalLM",
    "skywork_moe": "SkyworkForCausalLM",
}
# What tensors' names begin with that are no part of the decoder: parts that see, layers that guess
# further tokens, masks, and what chooses tokens that are too many to attend to all.
_GUESSING = ("model.layers.{n_layers}.",)
_IGNORED: Mapping[str, tuple[str, ...]] = {
    "deepseek_v3": _GUESSING,
    "deepseek_v32": (*_GUESSING, "model.layers.{layer}.self_attn.indexer."),
    "dots1": _GUESSING,
    "ernie4_5_moe": ("model.mtp_",),
    "glm4_moe": _GUESSING,
    "glm4_moe_lite": _GUESSING,
    "gpt2": ("transformer.h.{layer}.attn.bias", "transformer.h.{layer}.attn.masked_bias"),
    "kimi_k2": _GUESSING,
    "llama4": ("vision_model.", "multi_modal_projector."),
    "qwen3_5_moe": ("model.visual.", "mtp."),
    "qwen3_5_moe_text": ("mtp.",),
    "qwen3_next": ("mtp.",),
}

# Where some roles are in checkpoints that another program wrote.
_OTHER_NAMES: Mapping[str, Mapping[str, str | Stored]] = {
    "mixtral": mixtral.OTHER_NAMES,
    "qwen3_5_moe": qwen3_5_moe.OTHER_NAMES,
    "qwen3_5_moe_text": qwen3_5_moe_text.OTHER_NAMES,
}

# How the names of tensors begin that some checkpoints of a family begin without.
_PREFIXES: Mapping[str, str] = {"gpt2": "transformer."}

# Keys by which a config asks for code of its own to be run, or reaches into transformers' loader.
_DANGEROUS = ("auto_map", "trust_remote_code", "_attn_implementation_internal")


MAX_EXPERTS = 2**18  # of all layers; ten times as many as any model has


@dataclass(frozen=True)
class Family:
    """A model's spec, and where its checkpoint keeps every role.

    others: where some roles are instead in checkpoints that another program wrote; ignored:
    beginnings of names that no role needs; without: what names of this checkpoint begin without.
    """

    spec: ModelSpec
    table: Mapping[str, str | Stored]
    ignored: tuple[str, ...]
    others: Mapping[str, str | Stored] = field(default_factory=dict)
    without: str = ""

    @functools.cached_property
    def shapes(self) -> Mapping[Role, tuple[int, ...]]:
        """Every tensor a checkpoint must have: tens of thousands, which a folder does without."""
        return dict(checkpoint_tensors(self.spec))

    def as_found(self, names: Set[str]) -> "Family":
        """The same for a checkpoint that has tensors of these names."""
        return self._of_other_program(names)._without_prefix(names)

    def _of_other_program(self, names: Set[str]) -> "Family":
        other = replace(self, table={**self.table, **self.others}, others={})
        some = next((role for role in self.shapes if role.name in self.others), None)
        if some is not None and other.tensor_name(some) in names:
            return other
        return self

    def _without_prefix(self, names: Set[str]) -> "Family":
        prefix = _PREFIXES.get(self.spec.model_type, "")
        if not prefix or any(name.startswith(prefix) for name in names):
            return self
        ignored = tuple(name.removeprefix(prefix) for name in self.ignored)
        return replace(self, ignored=ignored, without=prefix)

    def tensor_name(self, role: Role) -> str:
        """The checkpoint's name for the tensor a role is in."""
        entry = self.table[role.name]
        template = entry if isinstance(entry, str) else entry.name
        name = template.format(layer=role.layer_id, expert=role.expert_id)
        return name.removeprefix(self.without)

    def piece(self, role: Role) -> Piece:
        """Which part of which tensor a role is."""
        entry, wanted = self.table[role.name], self.shapes[role]
        if isinstance(entry, str):
            entry = Stored(name=entry)
        start, end, all_rows = self._rows(entry, role)
        n_heads = self._n_heads(role) if entry.in_heads else 1
        step = len(entry.holds) if entry.interleaved else 1
        if entry.interleaved:
            start, end = entry.holds.index(role.name), all_rows
        one = (all_rows, *wanted[1:])
        whole = one[::-1] if entry.transposed else one
        first, count = 0, whole[0]
        shape = whole
        if entry.experts is not None:
            assert role.expert_id is not None
            assert role.layer_id is not None
            n = self.spec.layers[role.layer_id].feed_forward.n_experts
            if entry.experts == "axis":
                shape, first, count = (n, *whole), role.expert_id, 1
            else:
                shape, first = (n * whole[0], *whole[1:]), role.expert_id * whole[0]
        elif entry.in_heads:
            start, end = start // n_heads, end // n_heads
        elif not entry.transposed and not entry.interleaved:
            # What is contiguous in the file is all that is read.
            first, count, start, end = start, end - start, 0, end - start
        if entry.leading_one:
            shape, first, count = (1, *shape), 0, 1
        if entry.middle_one:
            shape = (shape[0], 1, *shape[1:])
        return Piece(
            name=self.tensor_name(role),
            shape=shape,
            first=first,
            count=count,
            transposed=entry.transposed,
            rows=slice(start, end, step),
            wanted=wanted,
            pairs=self._pairs(role) if entry.pairs else None,
            n_heads=n_heads,
            less_one=entry.less_one,
            minus_exp=entry.minus_exp,
            tiled=self._tiled(entry, role),
        )

    def _n_heads(self, role: Role) -> int:
        """By how many heads a tensor is divided that several roles share."""
        assert role.layer_id is not None
        attention = self.spec.layers[role.layer_id].attention
        if isinstance(attention, GatedDeltaNet):
            return attention.n_key_heads
        return attention.n_heads

    def _tiled(self, entry: Stored, role: Role) -> tuple[int, int, int, int] | None:
        """Which of a role's rows or columns are heads that lie apart: the last of them."""
        if entry.tiled is None:
            return None
        assert role.layer_id is not None
        net = self.spec.layers[role.layer_id].attention
        assert isinstance(net, GatedDeltaNet)
        first = 2 * net.all_keys if role.name == "delta_taps" else 0
        return ("rows", "columns").index(entry.tiled), first, net.n_key_heads, net.n_heads

    def _rows(self, entry: Stored, role: Role) -> tuple[int, int, int]:
        """Where a role's rows begin and end in the tensor that holds them, and all rows of it."""
        sizes = {role.name: self.shapes[role][0]}
        if entry.holds:
            sizes = {
                name: self.shapes[Role(name, role.layer_id, role.expert_id)][0]
                for name in entry.holds
            }
        before = 0
        for name, size in sizes.items():
            if name == role.name:
                break
            before += size
        return before, before + sizes[role.name], sum(sizes.values())

    def _pairs(self, role: Role) -> tuple[int, int, int]:
        assert role.layer_id is not None
        attention = self.spec.layers[role.layer_id].attention
        assert not isinstance(attention, GatedDeltaNet | LightningAttention)
        if isinstance(attention, LatentAttention):
            # Those that turn come last, in every query head as in what is kept of a token.
            before = attention.kv_rank if role.name == "kv_down" else attention.plain_size
            return before + attention.rope_size, before, attention.rope_size
        rope = attention.rope
        if rope is None:
            return attention.head_size, 0, 0
        return attention.head_size, 0, rope.size or attention.head_size


def read_config(config: Mapping[str, Any]) -> Family:
    """The family of a config.json.  Raises UnsupportedModelError for what nobody implemented."""
    model_type = config.get("model_type")
    _refuse_code(config, _KNOWN_CODE.get(str(model_type)))
    if not isinstance(model_type, str):
        raise CheckpointError(
            f"config.json: model_type is {model_type!r}, but must name a model family. "
            "Is this a model's config.json?"
        )
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"config.json: model_type is {model_type!r}, but implemented are "
            f"{', '.join(sorted(FAMILIES))}."
        )
    module = FAMILIES[model_type]
    spec: ModelSpec = module.spec(HfConfig(config))
    _refuse_too_many(sum(layer.feed_forward.n_experts for layer in spec.layers))
    ignored = tuple(_ignored(model_type, len(spec.layers)))
    return Family(spec, module.NAMES, ignored, _OTHER_NAMES.get(model_type, {}))


def _refuse_too_many(n_experts: int) -> None:
    """Before each gets a name of its own."""
    if n_experts > MAX_EXPERTS:
        raise CheckpointError(
            f"config.json: describes {n_experts} experts in all layers, but at most {MAX_EXPERTS} "
            "are allowed. The file is damaged; download it again."
        )


def _ignored(model_type: str, n_layers: int) -> Iterator[str]:
    for name in _IGNORED.get(model_type, ()):
        for layer_id in range(n_layers) if "{layer}" in name else (0,):
            yield name.format(n_layers=n_layers, layer=layer_id)


def _refuse_code(config: Mapping[str, Any], known: str | None) -> None:
    """known: the class of a checkpoint's own code that may be passed by."""
    dangerous = [key for key in _DANGEROUS if key in config]
    table = config.get("auto_map")
    wanted = table.get("AutoModelForCausalLM") if isinstance(table, dict) else None
    if known is not None and str(wanted).rpartition(".")[2] == known:
        dangerous.remove("auto_map")
    if dangerous:
        raise UnsupportedModelError(
            f"config.json has {', '.join(dangerous)}: it wants code of its own to run, and lowmoe "
            "never runs a checkpoint's code. Look for a conversion of the model without it."
        )
