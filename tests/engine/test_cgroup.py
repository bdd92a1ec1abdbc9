"""Limits of control groups are read from a tree like the kernel's."""

from collections.abc import Callable
from pathlib import Path

import pytest

from lowmoe.engine import cgroup
from lowmoe.engine.cgroup import MemoryLimit, cpu_limits, memory_limits

Tree = Callable[[str, dict[str, str]], None]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """Writes the files of one group; "" is the root.  Our own group is /slice/ours."""
    root = tmp_path / "cgroup"
    root.mkdir()
    (tmp_path / "own").write_text("4:memory:/elsewhere\n0::/slice/ours\n")
    monkeypatch.setattr(cgroup, "ROOT", root)
    monkeypatch.setattr(cgroup, "OWN", tmp_path / "own")

    def write(group: str, files: dict[str, str]) -> None:
        folder = root / group
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text + "\n")

    return write


def test_the_limit_is_the_lower_of_max_and_high(tree: Tree) -> None:
    tree("slice/ours", {"memory.max": "8000", "memory.high": "7000", "memory.current": "1000"})
    assert memory_limits() == [MemoryLimit(limit_bytes=7000, used_bytes=1000)]


def test_the_groups_around_ours_bind_too(tree: Tree) -> None:
    tree("slice/ours", {"memory.max": "max", "memory.high": "max"})
    tree("slice", {"memory.max": "5000", "memory.high": "max", "memory.current": "4000"})
    tree("", {"memory.max": "9000"})
    assert memory_limits() == [
        MemoryLimit(limit_bytes=5000, used_bytes=4000),
        MemoryLimit(limit_bytes=9000, used_bytes=0),
    ]


def test_file_pages_count_as_free_but_tmpfs_does_not(tree: Tree) -> None:
    stat = "anon 100\nfile 900\nshmem 300\ninactive_file 200\nactive_file 400"
    tree("slice/ours", {"memory.max": "5000", "memory.current": "1000", "memory.stat": stat})
    assert memory_limits() == [MemoryLimit(limit_bytes=5000, used_bytes=400)]


def test_in_a_container_the_limits_are_at_the_root(tree: Tree) -> None:
    # /slice/ours is the host's name for the group; inside, there is no such folder.
    tree("", {"memory.max": "6000", "memory.current": "10", "cpu.max": "150000 100000"})
    assert memory_limits() == [MemoryLimit(limit_bytes=6000, used_bytes=10)]
    assert cpu_limits() == [1.5]


def test_a_path_that_leaves_the_tree_is_not_followed(tree: Tree, tmp_path: Path) -> None:
    (tmp_path / "own").write_text("0::/../outside\n")
    tree("../outside", {"memory.max": "1"})
    tree("", {"memory.max": "6000"})
    assert memory_limits() == [MemoryLimit(limit_bytes=6000, used_bytes=0)]


def test_no_limit_anywhere_is_no_limit(tree: Tree) -> None:
    tree("slice/ours", {"memory.max": "max", "cpu.max": "max 100000"})
    assert memory_limits() == []
    assert cpu_limits() == []


def test_a_system_without_control_groups_has_no_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroup, "ROOT", tmp_path / "none")
    monkeypatch.setattr(cgroup, "OWN", tmp_path / "none" / "either")
    assert memory_limits() == []
    assert cpu_limits() == []


def test_every_group_with_a_processor_quota_counts(tree: Tree) -> None:
    tree("slice/ours", {"cpu.max": "400000 100000"})
    tree("slice", {"cpu.max": "250000 100000"})
    assert cpu_limits() == [4.0, 2.5]
