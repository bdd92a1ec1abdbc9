"""The house's floors: a room imports from lower floors only, never sideways or up."""

import ast
from pathlib import Path

import pytest

import quant

REPOSITORY = Path(quant.__file__).parent.parent
FLOORS = {
    "errors": 0,
    "quant": 0,
    "cuda_ext": 1,
    "spec": 1,
    "settings": 1,
    "timeline": 1,
    "cards": 1,
    "families": 2,
    "kernels": 2,
    "checkpoint": 2,
    "experts": 3,
    "decoder": 4,
    "engine": 5,
    "loader": 5,
    "library": 6,
    "plan": 6,
    "api": 7,
    "server": 8,
    "cli": 9,
}
FACES = {"__init__": "api", "__main__": "cli"}  # the package's own modules speak for a room


def room_of(module: str) -> str | None:
    """The room a module lies in; None for other people's packages."""
    package, *parts = module.split(".")
    if package in ("quant", "cuda_ext"):
        return package
    if package != "lowmoe":
        return None
    first = parts[0] if parts else "__init__"
    return FACES.get(first, first)


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)


def sources() -> list[Path]:
    houses = ("cuda_ext", "lowmoe", "quant")
    return sorted(p for house in houses for p in (REPOSITORY / house).rglob("*.py"))


def imports(source: str) -> set[str]:
    """Every room that a source imports from, wherever in it the import stands."""
    rooms = set()
    for node in ast.walk(ast.parse(source)):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [name.name for name in node.names]
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which room they mean"
            modules = [node.module or ""]
            if node.module == "lowmoe":
                modules = [f"lowmoe.{n.name}" if n.name in FLOORS else "lowmoe" for n in node.names]
        rooms |= {room for room in map(room_of, modules) if room is not None}
    return rooms


def complaints(room: str, source: str) -> list[str]:
    """What a source of a room imports and must not."""
    if room not in FLOORS:
        return [f"{room} is on no floor"]
    found = []
    for other in sorted(imports(source) - {room}):
        if other not in FLOORS:
            found.append(f"{other} is on no floor")
        elif FLOORS[other] >= FLOORS[room] and other != "quant":
            found.append(f"{room} on floor {FLOORS[room]} imports {other} on {FLOORS[other]}")
        elif room == "quant":
            found.append(f"quant imports {other}")
    return found


def test_there_is_a_house() -> None:
    assert {"errors", "quant", "cuda_ext", "experts", "decoder"} <= {
        room_of(module_of(path)) for path in sources()
    }


@pytest.mark.parametrize("path", sources(), ids=module_of)
def test_a_room_imports_from_lower_floors_only(path: Path) -> None:
    room = room_of(module_of(path))
    assert room is not None
    assert complaints(room, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("decoder", "from lowmoe.engine.load import load"),
        ("decoder", "def f():\n    import lowmoe.api"),
        ("decoder", "if TYPE_CHECKING:\n    from lowmoe import api"),
        ("decoder", "from lowmoe import load"),
        ("kernels", "from lowmoe.checkpoint import reader"),
        ("quant", "import lowmoe.errors"),
        ("errors", "from lowmoe.spec import ModelSpec"),
        ("decoder", "from lowmoe.utilities import helper"),
        ("utilities", "import json"),
    ],
)
def test_a_trespasser_is_caught(room: str, source: str) -> None:
    assert complaints(room, source)


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("decoder", "from lowmoe import errors, spec\nimport torch"),
        ("decoder", "from lowmoe.decoder.norm import rms_norm"),
        ("errors", "from quant.layout import MAX_PLANES"),
        ("quant", "from quant import nf4\nimport lowmoethods"),
        ("cli", "import lowmoe"),
    ],
)
def test_an_honest_neighbour_is_not(room: str, source: str) -> None:
    assert complaints(room, source) == []
