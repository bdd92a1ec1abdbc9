"""A model while it is loaded, and after.

Knows:        the parts of a running model, who gives what back.
Ignorant of:  how the parts are chosen and made.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from lowmoe.checkpoint.folder import ModelFolder
from lowmoe.checkpoint.popularity import POPULARITY, read_popularity
from lowmoe.decoder.decoder import Decoder
from lowmoe.decoder.weights import DenseWeights
from lowmoe.engine.forms import Forms
from lowmoe.engine.load_options import LoadOptions
from lowmoe.engine.text_parts import TextParts
from lowmoe.experts.hybrid import HybridExperts
from lowmoe.experts.lender import Lender
from lowmoe.experts.policy import UNKNOWN, Popularity
from lowmoe.experts.resident import ResidentExperts
from lowmoe.experts.store import ExpertStore
from lowmoe.kernels import cpu
from lowmoe.kernels.gpu import Gpu
from lowmoe.spec import ModelSpec

AnyDecoder: TypeAlias = Decoder[ExpertStore] | Decoder[ResidentExperts] | Decoder[HybridExperts]


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """A model in memory.  bits: what experts are computed at, 2, 4, 6 or the dtype's 16 or 32.

    forms: that answers must have; n_context: tokens a conversation may have; n_sequences: how many
    there may be at once;
    dense_bytes_per_token: read for every token; isa: of the native code that computes, or torch or
    cuda; pool: its threads; gpu: which has all of it, or with a pool beside it, all but some of the
    experts, None where nothing is on one; folder: None for a checkpoint; trades: quality for speed,
    in words; predict: tokens/s of decode after so many tokens, as planned, None where that is not
    known; probe: uint8, weights to read where RAM's speed is measured, None to take other memory.
    """

    spec: ModelSpec
    decoder: AnyDecoder
    store: Lender
    text: TextParts
    forms: Forms
    bits: int
    n_context: int
    n_sequences: int
    dense_bytes: int
    dense_bytes_per_token: int
    isa: str
    pool: cpu.Pool | None
    gpu: Gpu | None
    folder: ModelFolder | None
    trades: tuple[str, ...]
    _closing: ExitStack
    predict: Callable[[int], float] | None = None
    probe: Tensor | None = None

    @property
    def end_ids(self) -> set[int]:
        """Of the tokens that end an answer."""
        return self.text.end_ids(self.spec.end_ids)

    def close(self) -> None:
        """Give memory, files and threads back."""
        self._closing.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """What was read of a model and asked of it.  weights: in RAM; context: tokens."""

    spec: ModelSpec
    weights: DenseWeights
    context: int
    text: TextParts
    folder: ModelFolder | None
    options: LoadOptions
    closing: ExitStack

    @property
    def opened(self) -> ModelFolder:
        """The folder, of a model that comes from one."""
        assert self.folder is not None
        return self.folder

    def popularity(self) -> Popularity:
        """Of experts, if the folder says.  Raises FolderError for what it says being damaged."""
        data = None if self.folder is None else self.folder.small_file(POPULARITY)
        if data is None:
            return UNKNOWN
        layers = enumerate(read_popularity(data, self.spec.n_experts_by_layer))
        return Popularity({(i, e): s for i, layer in layers for e, s in enumerate(layer)})

    def runtime(
        self,
        decoder: AnyDecoder,
        *,
        bits: int,
        isa: str,
        pool: cpu.Pool | None = None,
        gpu: Gpu | None = None,
        probe: Tensor | None = None,
    ) -> Runtime:
        """The whole of it."""
        return Runtime(
            spec=self.spec,
            decoder=decoder,
            store=decoder.store,
            text=self.text,
            forms=Forms(self.text, self.spec.end_ids),
            bits=bits,
            n_context=self.context,
            n_sequences=self.options.sequences,
            dense_bytes=self.weights.n_bytes,
            dense_bytes_per_token=self.weights.bytes_per_token,
            isa=isa,
            pool=pool,
            gpu=gpu,
            folder=self.folder,
            trades=self.options.trades,
            probe=probe,
            _closing=self.closing.pop_all(),
        )
