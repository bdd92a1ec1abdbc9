"""Does going on refuse what does not belong together, and take no damaged work for done?"""

import re
import shutil
from pathlib import Path

import pytest

from lowmoe.checkpoint import files
from lowmoe.checkpoint.layout import Recipe
from lowmoe.errors import FolderError
from tests.checkpoint.faulty_os import FaultyOs
from tests.checkpoint.tiny_mixtral import (
    Options,
    config_with,
    contents,
    convert,
    write_tiny_mixtral,
)


@pytest.fixture
def unfinished(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose conversion was stopped in the second layer."""

    def before_call(number: int, name: str) -> None:
        if number >= 110:
            raise OSError("stopped by the test")

    with monkeypatch.context() as patch:
        patch.setattr(files, "os", FaultyOs(before_call=before_call))
        with pytest.raises(FolderError, match="stopped by the test"):
            convert(tiny_checkpoint, tmp_path / "unfinished")
    assert (tmp_path / "unfinished" / "state-00001.bin").is_file()
    return tmp_path / "unfinished"


# By what the error says of them.
OTHERS = {
    "recipe.expert_planes is 2, but 1": Options(recipe=Recipe(expert_planes=1)),
    'recipe.format is "trellis", but "nf4"': Options(recipe=Recipe(format="nf4")),
    'source.name is "tiny", but "other"': Options(name="other"),
    'calibration is {"n_tokens": 48, "text_hash": "of random token ids"}, but null': Options(
        calibrated=False
    ),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_options_cannot_go_on_with_what_was_begun(
    tiny_checkpoint: Path, unfinished: Path, converted: dict[str, bytes], other: str
) -> None:
    with pytest.raises(
        FolderError,
        match="holds an unfinished conversion of another checkpoint or with other options: "
        + re.escape(other),
    ):
        convert(tiny_checkpoint, unfinished, OTHERS[other])
    convert(tiny_checkpoint, unfinished)  # nor do they harm it
    assert contents(unfinished) == converted


@pytest.mark.parametrize("other", OTHERS)
def test_other_options_are_not_taken_for_done(
    tiny_checkpoint: Path, model: Path, converted: dict[str, bytes], other: str
) -> None:
    with pytest.raises(
        FolderError,
        match="holds the model of another checkpoint or with other options: " + re.escape(other),
    ):
        convert(tiny_checkpoint, model, OTHERS[other])
    assert contents(model) == converted


def test_another_model_of_the_same_name_is_refused(tmp_path: Path, model: Path) -> None:
    write_tiny_mixtral(tmp_path / "other", config_with(rope_theta=1e6))
    with pytest.raises(
        FolderError,
        match=r"the model of another checkpoint.*: config\.rope_theta is 10000\.0, but 1000000",
    ):
        convert(tmp_path / "other", model)


def test_weights_that_changed_are_another_checkpoint(
    tmp_path: Path, unfinished: Path, model: Path
) -> None:
    write_tiny_mixtral(tmp_path / "changed", seed=1)
    for folder, what in ((unfinished, "an unfinished conversion"), (model, "the model")):
        with pytest.raises(FolderError, match=f"holds {what} of another checkpoint"):
            convert(tmp_path / "changed", folder)


def test_the_same_weights_elsewhere_are_the_same_checkpoint(
    tmp_path: Path, tiny_checkpoint: Path, unfinished: Path, converted: dict[str, bytes]
) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    convert(tmp_path / "copy", unfinished)
    assert contents(unfinished) == converted


def test_a_finished_folder_is_left_as_it_is(
    tiny_checkpoint: Path, model: Path, converted: dict[str, bytes]
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in model.iterdir()}
    convert(tiny_checkpoint, model)
    assert contents(model) == converted
    assert {path.name: path.stat().st_mtime_ns for path in model.iterdir()} == before


def test_what_a_killed_end_left_is_removed(
    tiny_checkpoint: Path, model: Path, unfinished: Path, converted: dict[str, bytes]
) -> None:
    for name in ("journal.jsonl", "state-00001.bin"):
        shutil.copy(unfinished / name, model)
    (model / "manifest.json.lowmoe-aside").write_bytes(b"{")
    convert(tiny_checkpoint, model)
    assert contents(model) == converted


def test_files_of_others_are_left_alone(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("download.tmp", "notes.txt"):
        (folder / name).write_bytes(b"mine")
    convert(tiny_checkpoint, folder)
    assert (folder / "download.tmp").read_bytes() == b"mine"
    assert (folder / "notes.txt").read_bytes() == b"mine"


# Damage to what is not finished


def test_a_damaged_journal_costs_work_and_nothing_else(
    tiny_checkpoint: Path, unfinished: Path, converted: dict[str, bytes], tmp_path: Path
) -> None:
    journal = (unfinished / "journal.jsonl").read_bytes()
    went_on = 0
    for position in range(0, len(journal), 97):
        folder = tmp_path / str(position)
        shutil.copytree(unfinished, folder)
        damaged = bytearray(journal)
        damaged[position] ^= 1 << position % 8
        (folder / "journal.jsonl").write_bytes(damaged)
        try:
            convert(tiny_checkpoint, folder)
        except FolderError:
            # Work was lost that needs the state before the one that is kept.
            assert not (folder / "manifest.json").exists()
        else:
            assert contents(folder) == converted, position
            went_on += 1
        shutil.rmtree(folder)
    assert went_on >= 10


@pytest.mark.parametrize("tail", [b"\0" * 5000, b"{", b"0" * 32 + b" {}\n", b"\n", b"\xff\n"])
def test_a_journal_with_garbage_at_its_end_goes_on(
    tiny_checkpoint: Path, unfinished: Path, converted: dict[str, bytes], tail: bytes
) -> None:
    with (unfinished / "journal.jsonl").open("ab") as file:
        file.write(tail)
    convert(tiny_checkpoint, unfinished)
    assert contents(unfinished) == converted


def test_a_damaged_state_is_not_gone_on_from(tiny_checkpoint: Path, unfinished: Path) -> None:
    state = unfinished / "state-00001.bin"
    data = bytearray(state.read_bytes())
    data[1000] ^= 4
    state.write_bytes(data)
    with pytest.raises(FolderError, match=r"state-00001\.bin: is not what was written. Remove the"):
        convert(tiny_checkpoint, unfinished)
    state.unlink()
    with pytest.raises(FolderError, match=r"state-00001\.bin: missing"):
        convert(tiny_checkpoint, unfinished)


def test_transforms_that_were_damaged_code_no_expert(
    tiny_checkpoint: Path, unfinished: Path, model: Path
) -> None:
    """The rest of a layer's experts is coded with what was written down for the first of them."""
    path, whole = unfinished / "dense.safetensors", (model / "dense.safetensors").read_bytes()
    header = whole[: int.from_bytes(whole[:8], "little") + 8]
    assert path.read_bytes().startswith(header)
    path.write_bytes(header + bytes(len(whole) - len(header)))
    with pytest.raises(FolderError, match=r"layers\.1\.experts\.d_inner is not what was written"):
        convert(tiny_checkpoint, unfinished)


@pytest.mark.parametrize("name", ["dense.safetensors", "experts-plane1-00001.safetensors"])
@pytest.mark.parametrize("n_bytes", [None, 0, 5000])
def test_spans_that_are_gone_are_not_taken_for_done(
    tiny_checkpoint: Path, unfinished: Path, name: str, n_bytes: int | None
) -> None:
    path = unfinished / name
    if n_bytes is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:n_bytes])
    with pytest.raises(FolderError, match=rf"{name}: {n_bytes or 0} bytes, but the journal tells"):
        convert(tiny_checkpoint, unfinished)
