"""Does a pull from the hub end with the hub's own bytes?"""

import os
from pathlib import Path

import huggingface_hub
import pytest

from lowmoe.errors import (
    DownloadError,
)
from lowmoe.loader.hub import DownloadProgress, RetryPolicy
from tests.loader.fake_hub import (
    FakeHub,
    Fault,
    tiny_checkpoint,
)
from tests.loader.hub_pulls import CHUNK_BYTES, MEGABYTE, OTHER_SHARD, SHARD, content, pull

pytestmark = pytest.mark.usefixtures("library_sleeps", "fresh_client")


# When nothing goes wrong


def test_the_fake_hub_satisfies_the_librarys_own_downloader(hub: FakeHub, tmp_path: Path) -> None:
    for name in (SHARD, "config.json"):
        path = huggingface_hub.hf_hub_download(
            hub.repo_id, name, endpoint=hub.endpoint, local_dir=tmp_path
        )
        assert Path(path).read_bytes() == content(hub, name)
    info = huggingface_hub.HfApi(endpoint=hub.endpoint).model_info(hub.repo_id, files_metadata=True)
    assert info.sha == hub.branches["main"]


def test_every_file_arrives_as_the_hub_holds_it(hub: FakeHub, tmp_path: Path) -> None:
    repository = pull(hub, tmp_path / "new" / "folder")
    small = repository.fetch_small()
    names = [file.name for file in repository.files]
    assert sorted(names) == [
        "config.json",
        SHARD,
        OTHER_SHARD,
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    for name in names:
        assert repository.fetch(name).read_bytes() == content(hub, name)
        assert (small / name).is_file()
    assert repository.commit == hub.branches["main"]
    assert repository.total_bytes() == 600_000
    assert repository.shard_bytes() == {SHARD: 300_000, OTHER_SHARD: 300_000}
    assert sorted(os.listdir(small)) == sorted([*names, "pull.json", "pull.lock"])


def test_code_and_pickles_are_not_even_asked_for(hub: FakeHub, tmp_path: Path) -> None:
    hub.add_commit(tiny_checkpoint() | {"pytorch_model.bin": b"pickle", "original/x.pt": b""})
    repository = pull(hub, tmp_path)
    repository.fetch_small()
    assert not [r for r in hub.requests if r.file.endswith((".py", ".bin", ".pt", ".md"))]
    with pytest.raises(DownloadError, match=r"lists no file 'modeling_tiny\.py' to fetch"):
        repository.fetch("modeling_tiny.py")


def test_a_shard_the_index_does_not_name_is_left_out(hub: FakeHub, tmp_path: Path) -> None:
    extra = {"consolidated.safetensors": b"twice", "original/model.safetensors": b"thrice"}
    hub.add_commit(tiny_checkpoint() | extra)
    repository = pull(hub, tmp_path)
    assert [f.name for f in repository.files if f.is_shard] == [SHARD, OTHER_SHARD]
    assert repository.total_bytes() == 600_000


def test_one_shard_without_an_index_is_a_checkpoint(hub: FakeHub, tmp_path: Path) -> None:
    hub.add_commit({"config.json": b"{}", "model.safetensors": b"weights"})
    repository = pull(hub, tmp_path)
    assert repository.fetch("model.safetensors").read_bytes() == b"weights"
    assert repository.shard_bytes() == {"model.safetensors": 7}


def test_a_fetched_shard_is_not_downloaded_twice(hub: FakeHub, tmp_path: Path) -> None:
    repository = pull(hub, tmp_path)
    repository.fetch(SHARD)
    repository.fetch(SHARD)
    pull(hub, tmp_path).fetch(SHARD)
    assert len(hub.downloads(SHARD)) == 1


def test_a_released_shard_is_gone_and_can_be_fetched_again(hub: FakeHub, tmp_path: Path) -> None:
    repository = pull(hub, tmp_path)
    path = repository.fetch(SHARD)
    repository.release(SHARD)
    repository.release(SHARD)
    assert not path.exists()
    assert repository.fetch(SHARD).read_bytes() == content(hub, SHARD)
    assert len(hub.downloads(SHARD)) == 2


def test_releasing_a_half_fetched_shard_deletes_its_beginning(hub: FakeHub, tmp_path: Path) -> None:
    hub.faults[SHARD] = [Fault(cut_after=260_000, then_gone=True)]
    repository = pull(hub, tmp_path, retry=RetryPolicy(tries=1))
    with pytest.raises(DownloadError):
        repository.fetch(SHARD)
    assert [part.stat().st_size for part in tmp_path.glob("*.part")] == [CHUNK_BYTES]
    repository.release(SHARD)
    assert not list(tmp_path.glob("*.part"))


def test_progress_never_runs_backwards_and_ends_at_the_total(hub: FakeHub, tmp_path: Path) -> None:
    seen: list[DownloadProgress] = []
    hub.faults[SHARD] = [Fault(cut_after=100_000, from_storage=True)]
    repository = pull(hub, tmp_path, progress=seen.append)
    repository.fetch_small()
    repository.fetch(SHARD)
    repository.release(SHARD)
    repository = pull(hub, tmp_path, progress=seen.append)  # as after a kill
    repository.fetch_small()
    repository.fetch(OTHER_SHARD)
    done = [step.bytes_done for step in seen if step.file in (SHARD, OTHER_SHARD)]
    assert done == sorted(done)
    assert seen[-1].bytes_done == seen[-1].bytes_total == sum(f.bytes for f in repository.files)
    assert seen[-1].file_bytes_done == seen[-1].file_bytes == 300_000


def test_progress_is_never_a_chunk_ahead_of_the_disk(big_hub: FakeHub, tmp_path: Path) -> None:
    ahead: list[int] = []

    def look(step: DownloadProgress) -> None:
        paths = [tmp_path / f"{step.file}.part", tmp_path / step.file]
        on_disk = next(path for path in paths if path.exists()).stat().st_size
        ahead.append(step.file_bytes_done - on_disk)

    pull(big_hub, tmp_path, progress=look).fetch(SHARD)
    assert ahead == [CHUNK_BYTES] * (6 * MEGABYTE // CHUNK_BYTES) + [0]


def test_a_pull_that_is_over_leaves_nothing_behind(hub: FakeHub, tmp_path: Path) -> None:
    folder = tmp_path / "pull"
    repository = pull(hub, folder)
    repository.fetch_small()
    repository.fetch(SHARD)
    repository.release(SHARD)
    (folder / f"{OTHER_SHARD}.part").write_bytes(b"begun")
    repository.forget()
    assert not folder.exists()


def test_forgetting_a_pull_spares_what_is_not_its_own(hub: FakeHub, tmp_path: Path) -> None:
    repository = pull(hub, tmp_path)
    repository.fetch(SHARD)
    (tmp_path / "notes.txt").write_text("the user's")
    repository.forget()
    assert os.listdir(tmp_path) == ["notes.txt"]
