"""Calls of every operation, small but with edges everywhere, that together launch every kernel.

    python -m tests.cuda_ext.small_calls BUILD

makes them in a process of its own under a sanitizer; before each a line "== CALL" goes to stderr.

Knows:        operands of every operation, their exact sizes, which numbers of tokens and
              multiprocessors lead to which kernels.
Ignorant of:  what is right.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cuda_ext.launches import COUNTER_BYTES, attention, products, routing
from cuda_ext.ops import OPERATIONS
from quant.layout import MAX_PLANES
from tests.cuda_emulator.build import Build
from tests.cuda_emulator.emulated import ORDERS, EmulatedLaunch
from tests.cuda_ext import samples
from tests.cuda_ext.samples import SCALE_UNIT, TABLE

PLANES = (1, 2, 3)
FORMATS = (torch.float16, torch.float32, torch.int8)
FEW, LARGE, HUGE = 1, 9, 24  # multiprocessors: of a card that is soon full, and of ones that idle


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call.  outputs: those of the arguments that it writes and whose every bit counts."""

    name: str
    operation: str
    arguments: tuple[object, ...]
    outputs: tuple[Tensor, ...]
    workspace: Tensor | None = None
    n_multiprocessors: int = FEW

    def make(self, launch: EmulatedLaunch) -> list[Tensor]:
        launch.n_multiprocessors = self.n_multiprocessors
        run: Callable[..., None] = OPERATIONS[self.operation][0]
        room = () if self.workspace is None else (self.workspace,)
        run(launch, *self.arguments, *room)
        if self.workspace is not None:
            assert not self.workspace[:COUNTER_BYTES].any(), "the counters are for the next call"
        return [output.contiguous().view(torch.uint8) for output in self.outputs]


def all_calls() -> Iterator[Call]:
    """The same every time, with operands of their own."""
    yield from _vectors()
    yield from _linears()
    yield from _experts()
    yield from _attention()
    yield from _routing()


def _workspace(n_bytes: int) -> Tensor:
    """Zero where it must be, garbage elsewhere."""
    workspace = torch.full((n_bytes,), 0xEE, dtype=torch.uint8)
    workspace[:COUNTER_BYTES] = 0
    return workspace


def _vectors() -> Iterator[Call]:
    ids = torch.tensor([69, 0, 33], dtype=torch.int32)
    for n_planes in PLANES:
        matrix, x = samples.random_matrix(70, 200, n_planes), torch.empty(3, 200)
        given = (ids, list(matrix.planes), TABLE, SCALE_UNIT, matrix.d, x)
        yield Call(name=f"embed {n_planes}", operation="embed", arguments=given, outputs=(x,))
    for n_columns in (33, 330, 4300, 8256):  # up to 32, 64 and more scale groups
        x, d = samples.random_tokens(3, n_columns), samples.random_d(n_columns)
        rounded = samples.empty_rounded(3, n_columns)
        name = f"round_tokens {n_columns}"
        yield Call(name=name, operation="round_tokens", arguments=(x, d, *rounded), outputs=rounded)
        rounded = samples.empty_rounded(3, n_columns)
        router = torch.rand(1, 70) if n_columns < 4300 else None
        both = torch.randn(3, 2 * n_columns)
        yield Call(
            name=f"gate_round {n_columns}",
            operation="gate_round",
            arguments=(both, 1.5, 1.0, 0.7, torch.randn(3, 70), router, d, *rounded),
            outputs=rounded,
        )
        for normed in (torch.empty_like(x), torch.empty(0)):
            rounded = samples.empty_rounded(3, n_columns)
            yield Call(
                name=f"norm_round {n_columns} to {normed.numel()}",
                operation="norm_round",
                arguments=(x, torch.rand(n_columns), 1e-6, d, normed, *rounded),
                outputs=(normed, *rounded),
            )


def _linears() -> Iterator[Call]:
    n_out = 130
    for n_planes in PLANES:
        for n_tokens, card in ((1, FEW), (4, LARGE), (7, FEW), (40, FEW), (40, HUGE)):
            n_in = 1160 if n_tokens == 40 else 328  # enough to be cut into parts
            planes = list(samples.random_matrix(n_out, n_in, n_planes).planes)
            y = torch.ones(n_tokens, n_out)
            rounded = samples.random_rounded(n_tokens, n_in)
            add = n_tokens == 4
            bias = torch.rand(n_out) if n_tokens in (4, 40) else None
            yield Call(
                name=f"linear of {n_tokens} by {n_planes} on {card}",
                operation="linear",
                arguments=(*rounded, planes, TABLE, SCALE_UNIT, n_out, n_in, bias, add, y),
                outputs=(y,),
                workspace=_workspace(products.workspace_bytes(card, n_tokens, n_out, 0, 0)),
                n_multiprocessors=card,
            )


def _experts() -> Iterator[Call]:
    n_experts, n_hidden, n_inner, n_active = 5, 136, 200, 2
    for n_planes in PLANES:
        experts = samples.random_experts(n_experts, n_hidden, n_inner, n_planes, missing=(3,))
        for n_tokens, card in ((1, FEW), (4, LARGE), (7, FEW), (20, LARGE), (100, FEW)):
            groups = samples.random_groups(n_tokens, n_experts, n_active)
            places = (groups.first, groups.order, groups.active)
            code = (experts.table, n_planes, TABLE, SCALE_UNIT, *places)
            room = products.workspace_bytes(card, n_tokens, n_hidden, n_inner, n_active)
            inner = samples.empty_rounded(n_tokens * n_active, n_inner)
            yield Call(
                name=f"experts_inner of {n_tokens} by {n_planes} on {card}",
                operation="experts_inner",
                arguments=(
                    *samples.random_rounded(n_tokens, n_hidden), *code, experts.d_inner,
                    None if n_tokens == 1 else torch.rand(n_experts, 2 * n_inner), 1.7, 1.0, 0.9,
                    n_hidden, n_active, *inner,
                ),
                outputs=inner,
                workspace=_workspace(room),
                n_multiprocessors=card,
            )  # fmt: skip
            x = torch.ones(n_tokens, n_hidden)
            bias = None if n_tokens == 1 else torch.rand(n_experts, n_hidden)
            inner = samples.random_rounded(n_tokens * n_active, n_inner)
            yield Call(
                name=f"experts_down of {n_tokens} by {n_planes} on {card}",
                operation="experts_down",
                arguments=(*inner, *code, bias, groups.weights, n_inner, x),
                outputs=(x,),
                workspace=_workspace(room),
                n_multiprocessors=card,
            )


def _attention() -> Iterator[Call]:
    capacity, n_kv_heads = 301, 2
    positions = torch.tensor([300, 0, 130], dtype=torch.int32)
    sequences = torch.tensor([1, 0, 0], dtype=torch.int32)
    for dtype in FORMATS:
        for n_heads, head_size, window in ((2, 72, 0), (6, 72, 100), (2, 136, 100), (10, 136, 0)):
            qkv = torch.randn(3, (n_heads + 2 * n_kv_heads) * head_size)
            cache = samples.random_cache(2, n_kv_heads, capacity, head_size, dtype)
            where = (positions, sequences, n_heads)
            out = torch.empty(3, n_heads * head_size)
            sinks = torch.rand(n_heads) if window else None
            name = f"{dtype} of {n_heads} heads of {head_size}"
            room = attention.workspace_bytes(LARGE, 3, n_heads, n_kv_heads, head_size)
            yield Call(
                name=f"attend {name}",
                operation="attend",
                arguments=(qkv, *cache, *where, window, 0.1, sinks, out),
                outputs=(out,),
                workspace=_workspace(room),
                n_multiprocessors=LARGE,
            )
            for norm, width in enumerate((0, head_size, head_size, None)):
                weights = [
                    torch.rand(n * head_size if width is None else width)
                    for n in (n_heads, n_kv_heads)
                ]
                how = (norm, *(weights if norm else (None, None)), 1e-6, 2.0 if norm else torch.inf)
                turning = (torch.rand((head_size - 8 * norm) // 2), 1.1)
                yield Call(
                    name=f"rope_store {name} with norm {norm}",
                    operation="rope_store",
                    arguments=(qkv, *turning, *where, *how, *cache),
                    outputs=(qkv, *cache),
                )


def _routing() -> Iterator[Call]:
    for n_tokens, n_experts, n_active in ((1, 5, 2), (3, 40, 7), (20, 40, 7)):
        weights = torch.empty(n_tokens, n_active)
        ids = torch.empty(n_tokens, n_active, dtype=torch.int32)
        normed, router = torch.randn(n_tokens, 132), torch.randn(n_experts, 132)
        yield Call(
            name=f"route {n_tokens} to {n_experts}",
            operation="route",
            arguments=(normed, router, *_router(n_tokens, n_experts), weights, ids),
            outputs=(weights, ids),
            workspace=_workspace(routing.workspace_bytes(n_tokens, n_experts)),
        )
        yield _norm_route(n_tokens, 260, n_experts, n_active)
    for n_tokens, n_experts, n_active in ((1, 5, 2), (20, 40, 7)):
        workspace = _workspace(routing.workspace_bytes(n_tokens, n_experts))
        routing.scores_in(workspace, n_tokens, n_experts).normal_()
        places = samples.empty_groups(n_tokens * n_active, n_experts)
        outputs = (
            torch.empty(n_tokens, n_active),
            torch.empty(n_tokens, n_active, dtype=torch.int32),
            *places,
        )
        yield Call(
            name=f"prefer {n_tokens} of {n_experts}",
            operation="prefer",
            arguments=(_some_parts(n_experts), 0.5, n_tokens == 1, *outputs),
            outputs=outputs[:-1],  # what follows the active experts means nothing
            workspace=workspace,
        )
    for n_tokens, n_experts, n_active in ((1, 5, 2), (20, 40, 7), (160, 40, 7)):
        # The last are more assignments than threads of a block.
        chosen = samples.random_groups(n_tokens, n_experts, n_active).ids
        places = samples.empty_groups(n_tokens * n_active, n_experts)
        yield Call(
            name=f"group {n_tokens} of {n_experts}",
            operation="group",
            arguments=(chosen, n_experts, *places),
            outputs=places[:2],  # what follows the active experts means nothing
        )
    for n_hidden in (2050, 4100):  # up to 4096 and more columns
        yield _norm_route(1, n_hidden, 5, 2)


def _some_parts(n_experts: int) -> Tensor:
    """Every second expert is there; nobody reads what its address leads to."""
    parts = torch.zeros(n_experts, MAX_PLANES, dtype=torch.int64)
    parts[::2] = 1
    return parts


def _norm_route(n_tokens: int, n_hidden: int, n_experts: int, n_active: int) -> Call:
    x, weight = samples.random_tokens(n_tokens, n_hidden), torch.rand(n_hidden)
    router = torch.randn(n_experts, n_hidden)
    places = samples.empty_groups(n_tokens * n_active, n_experts)
    outputs = (
        torch.empty_like(x),
        *samples.empty_rounded(n_tokens, n_hidden),
        torch.empty(n_tokens, n_active),
        torch.empty(n_tokens, n_active, dtype=torch.int32),
        *places,
    )
    d, shared = None, (None, None)
    if n_tokens != 3:
        d, shared = samples.random_d(n_hidden), samples.empty_rounded(n_tokens, n_hidden)
    return Call(
        name=f"norm_route {n_tokens} of {n_hidden} to {n_experts}",
        operation="norm_route",
        arguments=(
            x,
            weight,
            1e-6,
            samples.random_d(n_hidden),
            router,
            *_router(n_tokens, n_experts),
            *outputs,
            d,
            *shared,
        ),
        outputs=outputs[:-1],  # what follows the active experts means nothing
        workspace=_workspace(routing.workspace_bytes(n_tokens, n_experts)),
    )


def _router(n_tokens: int, n_experts: int) -> tuple[object, ...]:
    """From bias to scale: softmax for one token, else sigmoids in groups."""
    if n_tokens == 1:
        return torch.rand(n_experts), None, False, False, 1, 1, 1.0
    return None, torch.rand(n_experts), True, True, 5, 3, 2.5


def main(build: str) -> None:
    torch.manual_seed(0)
    launch = EmulatedLaunch(Build[build])
    for index, call in enumerate(all_calls()):
        launch.order = ORDERS[index % len(ORDERS)]
        sys.stderr.write(f"== {call.name}\n")
        sys.stderr.flush()
        call.make(launch)
    sys.stderr.write("== the end\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
