"""What does the work folder of a pull remember, and what if the disk is the problem?"""

import errno
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from lowmoe.errors import (
    DiskSpaceError,
    DownloadError,
)
from lowmoe.loader.hub import HubRepository
from tests.loader.fake_hub import (
    FakeHub,
    tiny_checkpoint,
)
from tests.loader.hub_pulls import OTHER_SHARD, SHARD, Sleeps, content, pull

pytestmark = pytest.mark.usefixtures("library_sleeps", "fresh_client")


# What the folder remembers


def test_a_branch_that_moves_does_not_mix_two_commits(hub: FakeHub, tmp_path: Path) -> None:
    first = pull(hub, tmp_path)
    first.fetch(SHARD)
    begun = hub.branches["main"]
    hub.add_commit({name: data[::-1] for name, data in tiny_checkpoint().items()})
    second = pull(hub, tmp_path)
    assert second.commit == first.commit == begun != hub.branches["main"]
    assert second.files == first.files
    assert second.fetch(OTHER_SHARD).read_bytes() == hub.commits[begun][OTHER_SHARD]


def test_a_folder_belongs_to_one_pull(hub: FakeHub, tmp_path: Path) -> None:
    commit = pull(hub, tmp_path).commit
    found = rf"holds an unfinished pull of acme/tiny-moe \(commit {commit[:12]}\),"
    with pytest.raises(DownloadError, match=f"{found} asked for is acme/other"):
        HubRepository("acme/other", folder=tmp_path, endpoint=hub.endpoint)


def damage(text: str, **changed: object) -> str:
    return json.dumps(json.loads(text) | changed)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "\0" * len(text),
        lambda text: "[]",
        lambda text: "null",
        lambda text: "[" * 100_000,
        lambda text: damage(text, format=2),
        lambda text: damage(text, repo=None),
        lambda text: damage(text, commit="main"),
        lambda text: damage(text, files=[]),
        lambda text: damage(text, files={}),
        lambda text: damage(text, files=["x"]),
        lambda text: damage(text, files=[{"name": "x.safetensors"}]),
        lambda text: damage(text, released=[[]]),
        lambda text: text.replace(SHARD, "../" + SHARD),
    ],
)
def test_a_damaged_record_is_not_guessed_at(hub: FakeHub, tmp_path: Path, spoil: Any) -> None:
    pull(hub, tmp_path)
    record = tmp_path / "pull.json"
    record.write_text(spoil(record.read_text()))
    with pytest.raises(DownloadError, match=r"pull\.json is damaged .* Delete .* run the command"):
        pull(hub, tmp_path)


def test_a_pull_killed_before_its_record_was_whole_starts_anew(
    hub: FakeHub, tmp_path: Path
) -> None:
    (tmp_path / "pull.json.new").write_text('{"format": 1, "repo": "ac')
    assert pull(hub, tmp_path).fetch(SHARD).read_bytes() == content(hub, SHARD)


def test_two_pulls_do_not_write_into_one_folder(hub: FakeHub, tmp_path: Path) -> None:
    repository = pull(hub, tmp_path)
    with (
        FileLock(tmp_path / "pull.lock"),
        pytest.raises(DownloadError, match=r"another process is downloading into .*pull\.lock"),
    ):
        repository.fetch(SHARD)
    assert repository.fetch(SHARD).read_bytes() == content(hub, SHARD)


# When the disk is the problem


def test_too_little_room_is_said_before_the_first_byte(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = pull(hub, tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12, 299_999))
    found = rf"{SHARD} needs 300,000 more bytes in .*, free are 299,999\. Make room"
    with pytest.raises(DiskSpaceError, match=found):
        repository.fetch(SHARD)
    assert hub.downloads(SHARD) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full disk")
def test_a_disk_that_fills_up_meanwhile_is_named(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "pull.json.new").symlink_to("/dev/full")
    with pytest.raises(DiskSpaceError, match=r"the disk ran full while .*pull\.json.* was written"):
        pull(hub, tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full disk")
def test_a_disk_that_fills_up_under_a_shard_is_named_at_once(hub: FakeHub, tmp_path: Path) -> None:
    sleeps = Sleeps()
    repository = pull(hub, tmp_path, retry=sleeps.policy())
    (tmp_path / f"{SHARD}.part").symlink_to("/dev/full")
    with pytest.raises(DiskSpaceError, match=rf"the disk ran full while .*{SHARD} was written"):
        repository.fetch(SHARD)
    assert sleeps == []


def test_a_folder_that_cannot_be_made_is_named(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DownloadError, match=os.strerror(errno.ENOTDIR)):
        pull(hub, tmp_path / "file" / "folder")
