"""Does a pull from the hub end with the hub's own bytes, whatever happens on the way?"""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from filelock import FileLock

from lowmoe.errors import (
    CheckpointError,
    DiskSpaceError,
    DownloadError,
    LowMoeError,
    UnknownModelError,
)
from lowmoe.loader.hub import DownloadProgress, HubRepository, RetryPolicy
from tests.loader.fake_hub import (
    GATED,
    NO_REPOSITORY,
    FakeHub,
    Fault,
    git_blob_id,
    tiny_checkpoint,
)

SHARD = "model-00001-of-00002.safetensors"
OTHER_SHARD = "model-00002-of-00002.safetensors"
MEGABYTE = 1_000_000
# In place of the library's 10 MiB, which a test's whole shard fits in: what a cut may lose.
CHUNK_BYTES = 250_000


@pytest.fixture(autouse=True)
def library_sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits the library's own loop asked for; nobody has to sit through them."""
    waits: list[float] = []
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", waits.append)
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", CHUNK_BYTES)
    return waits


@pytest.fixture(autouse=True)
def fresh_client(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # The library keeps one client per process, with its connections and its view of the proxy.
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    huggingface_hub.close_session()
    yield
    huggingface_hub.close_session()


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        hub.add_commit(tiny_checkpoint())
        yield hub


@pytest.fixture
def big_hub() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        hub.add_commit(tiny_checkpoint(shard_bytes=6 * MEGABYTE))
        yield hub


class Sleeps(list[float]):
    """A clock nobody has to wait for: the waits it was asked for."""

    def policy(self, **changes: Any) -> RetryPolicy:
        return RetryPolicy(sleep=self.append, **changes)


def pull(hub: FakeHub, folder: Path, **options: Any) -> HubRepository:
    options.setdefault("retry", Sleeps().policy())
    return HubRepository(hub.repo_id, folder=folder, endpoint=hub.endpoint, **options)


def content(hub: FakeHub, name: str, branch: str = "main") -> bytes:
    return hub.commits[hub.branches[branch]][name]


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


# When the line breaks


@pytest.mark.parametrize("cut", range(MEGABYTE, 6 * MEGABYTE, MEGABYTE))
def test_an_interrupted_pull_goes_on_where_it_stopped(
    big_hub: FakeHub, tmp_path: Path, cut: int
) -> None:
    def interrupt(step: DownloadProgress) -> None:
        if step.file == SHARD and step.file_bytes_done >= cut:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(big_hub, tmp_path, progress=interrupt).fetch(SHARD)
    assert not (tmp_path / SHARD).exists()
    path = pull(big_hub, tmp_path).fetch(SHARD)
    assert path.read_bytes() == content(big_hub, SHARD)
    assert big_hub.downloads(SHARD)[-1].bytes_sent <= 6 * MEGABYTE - cut + CHUNK_BYTES


@pytest.mark.parametrize("cut", range(MEGABYTE, 6 * MEGABYTE, MEGABYTE))
@pytest.mark.parametrize("from_storage", [False, True])
def test_a_cut_line_costs_no_more_than_a_chunk(
    big_hub: FakeHub, tmp_path: Path, cut: int, from_storage: bool
) -> None:
    big_hub.faults[SHARD] = [Fault(cut_after=cut, from_storage=from_storage)]
    path = pull(big_hub, tmp_path).fetch(SHARD)
    assert path.read_bytes() == content(big_hub, SHARD)
    first, second = big_hub.downloads(SHARD)
    assert first.bytes_sent == cut
    assert second.bytes_sent <= 6 * MEGABYTE - cut + CHUNK_BYTES


def test_cuts_within_one_run_are_outlived_without_giving_up(
    big_hub: FakeHub, tmp_path: Path
) -> None:
    # More refusals than tries: as long as something arrives between them, none is hopeless.
    # The library itself outlives a cut, but not a 500.
    big_hub.faults[SHARD] = [Fault(cut_after=MEGABYTE // 2), Fault(status=500)] * 11
    sleeps = Sleeps()
    path = pull(big_hub, tmp_path, retry=sleeps.policy(tries=2)).fetch(SHARD)
    assert path.read_bytes() == content(big_hub, SHARD)
    assert sleeps == [1.0] * 11
    sent = sum(request.bytes_sent for request in big_hub.downloads(SHARD))
    assert sent <= 6 * MEGABYTE + 11 * CHUNK_BYTES


CHILD = f"""
import sys
from pathlib import Path
from huggingface_hub import constants
from lowmoe.loader.hub import HubRepository

constants.DOWNLOAD_CHUNK_SIZE = {CHUNK_BYTES}

def report(step):
    if step.file_bytes_done >= {2 * MEGABYTE}:
        print(step.file_bytes_done, flush=True)
        sys.stdin.read()  # until killed

repository = HubRepository(sys.argv[1], folder=Path(sys.argv[2]), progress=report)
repository.fetch(sys.argv[3])
"""


def start_child(hub: FakeHub, folder: Path, **env: str) -> subprocess.Popen[str]:
    """A pull in a process of its own, which finds the hub by HF_ENDPOINT as users have it."""
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, hub.repo_id, str(folder), SHARD],
        env=os.environ
        | {"HF_ENDPOINT": hub.endpoint, "PYTHONPATH": os.pathsep.join(sys.path)}
        | env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_pull_goes_on_where_it_stopped(big_hub: FakeHub, tmp_path: Path) -> None:
    with start_child(big_hub, tmp_path) as child:
        assert child.stdout is not None
        reached = int(child.stdout.readline())
        child.kill()
    assert child.returncode == -signal.SIGKILL
    assert not (tmp_path / SHARD).exists()
    path = pull(big_hub, tmp_path).fetch(SHARD)
    assert path.read_bytes() == content(big_hub, SHARD)
    # What the child had been given, it had already handed to the operating system.
    assert big_hub.downloads(SHARD)[-1].first_byte == reached - CHUNK_BYTES


def test_the_offline_switch_of_the_library_is_obeyed(hub: FakeHub, tmp_path: Path) -> None:
    with start_child(hub, tmp_path, HF_HUB_OFFLINE="1") as child:
        _, stderr = child.communicate()
    assert "DownloadError: acme/tiny-moe: HF_HUB_OFFLINE forbids the network" in stderr
    assert hub.requests == []


def test_the_offline_switch_costs_nothing_that_is_here(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = pull(hub, tmp_path)
    part, begun = tmp_path / f"{SHARD}.part", content(hub, SHARD)[:200_000]
    part.write_bytes(begun)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE forbids the network"):
        repository.fetch(SHARD)
    assert part.read_bytes() == begun


def test_what_lies_here_of_the_shards_is_counted_whole_or_begun(
    hub: FakeHub, tmp_path: Path
) -> None:
    repository = pull(hub, tmp_path)
    repository.fetch_small()
    assert repository.shard_bytes_here() == 0
    repository.fetch(SHARD)
    (tmp_path / f"{OTHER_SHARD}.part").write_bytes(bytes(1000))
    assert repository.shard_bytes_here() == 301_000


def test_a_server_that_goes_away_ends_the_pull_with_advice(hub: FakeHub, tmp_path: Path) -> None:
    hub.faults[SHARD] = [Fault(cut_after=260_000, then_gone=True)]
    sleeps = Sleeps()
    repository = pull(hub, tmp_path, retry=sleeps.policy())
    found = r"not all of its 300,000 bytes came, because the line to http://.* same command again"
    with pytest.raises(DownloadError, match=found):
        repository.fetch(SHARD)
    assert sleeps == [1, 2, 4, 8, 16, 32, 60]
    assert (tmp_path / f"{SHARD}.part").stat().st_size == CHUNK_BYTES


def test_no_network_at_the_start_is_said_at_once(hub: FakeHub, tmp_path: Path) -> None:
    hub.go_away()
    sleeps = Sleeps()
    with pytest.raises(DownloadError, match="no network: http://127"):
        pull(hub, tmp_path / "untouched", retry=sleeps.policy())
    assert sleeps == []
    assert not (tmp_path / "untouched").exists()


def test_an_address_that_is_none_is_not_tried_again(tmp_path: Path) -> None:
    sleeps = Sleeps()
    with pytest.raises(DownloadError, match=r"nonsense cannot be used, .* Check HF_ENDPOINT"):
        HubRepository("a/b", folder=tmp_path, endpoint="nonsense", retry=sleeps.policy())
    assert sleeps == []


def test_a_second_pull_needs_no_network_for_what_is_here(hub: FakeHub, tmp_path: Path) -> None:
    repository = pull(hub, tmp_path)
    repository.fetch_small()
    repository.fetch(SHARD)
    hub.go_away()
    again = pull(hub, tmp_path)
    assert again.fetch_small() == tmp_path
    assert again.fetch(SHARD).read_bytes() == content(hub, SHARD)


# When the hub is busy


@pytest.mark.parametrize("status", [500, 502, 503])
@pytest.mark.parametrize("key", ["api", SHARD])
def test_a_passing_refusal_is_outwaited(
    hub: FakeHub, tmp_path: Path, key: str, status: int
) -> None:
    hub.faults[key] = [Fault(status=status)] * 3
    sleeps = Sleeps()
    path = pull(hub, tmp_path, retry=sleeps.policy()).fetch(SHARD)
    assert path.read_bytes() == content(hub, SHARD)
    assert sleeps == [1.0, 2.0, 4.0]


@pytest.mark.parametrize("status", [408, 429])
def test_a_busy_hub_is_asked_for_its_list_again(hub: FakeHub, tmp_path: Path, status: int) -> None:
    hub.faults["api"] = [Fault(status=status)] * 3
    sleeps = Sleeps()
    assert pull(hub, tmp_path, retry=sleeps.policy()).commit == hub.branches["main"]
    assert sleeps == [1.0, 2.0, 4.0]


@pytest.mark.parametrize(
    "header",
    [("Retry-After", "77"), ("RateLimit", '"resolvers";r=0;t=77')],
)
def test_the_wait_a_busy_hub_asks_for_is_kept(
    hub: FakeHub, tmp_path: Path, header: tuple[str, str], library_sleeps: list[float]
) -> None:
    hub.faults[SHARD] = [Fault(status=429, headers=(header,))]
    pull(hub, tmp_path).fetch(SHARD)
    assert library_sleeps == [78.0]  # the library adds a second for rounding


def test_a_hub_that_stays_busy_is_given_up(hub: FakeHub, tmp_path: Path) -> None:
    # The library asks six times before it hands the refusal on.
    hub.faults[SHARD] = [Fault(status=429)] * 12
    sleeps = Sleeps()
    with pytest.raises(DownloadError, match="because the hub answered 429"):
        pull(hub, tmp_path, retry=sleeps.policy(tries=2)).fetch(SHARD)
    assert sleeps == [1.0]


def test_a_hub_that_stays_broken_is_given_up(hub: FakeHub, tmp_path: Path) -> None:
    hub.faults["api"] = [Fault(status=500)] * 9
    sleeps = Sleeps()
    with pytest.raises(DownloadError, match="no file list, because the hub answered 500"):
        pull(hub, tmp_path, retry=sleeps.policy())
    assert len(sleeps) == 7


def test_an_expired_storage_address_is_asked_for_anew(hub: FakeHub, tmp_path: Path) -> None:
    hub.faults[SHARD] = [Fault(status=403, from_storage=True)]
    assert pull(hub, tmp_path).fetch(SHARD).read_bytes() == content(hub, SHARD)


# When what arrives is not what was promised


@pytest.mark.parametrize("name", [SHARD, "config.json"])
def test_wrong_content_is_fetched_once_more(hub: FakeHub, tmp_path: Path, name: str) -> None:
    hub.faults[name] = [Fault(body=bytes(len(content(hub, name))))]
    repository = pull(hub, tmp_path)
    assert repository.fetch(name).read_bytes() == content(hub, name)
    assert len(hub.downloads(name)) == 2


@pytest.mark.parametrize(("name", "kind"), [(SHARD, "SHA-256"), ("config.json", "git SHA-1")])
def test_content_that_stays_wrong_is_refused_with_both_hashes(
    hub: FakeHub, tmp_path: Path, name: str, kind: str
) -> None:
    right, wrong = content(hub, name), bytes(len(content(hub, name)))
    hub.faults[name] = [Fault(body=wrong)] * 2
    hashes = [
        hashlib.sha256(data).hexdigest() if name == SHARD else git_blob_id(data)
        for data in (wrong, right)
    ]
    with pytest.raises(
        DownloadError, match=f"{name}: .*{kind} is {hashes[0]}, expected {hashes[1]}"
    ):
        pull(hub, tmp_path).fetch(name)
    assert not (tmp_path / name).exists()
    assert not list(tmp_path.glob("*.part"))
    assert len(hub.downloads(name)) == 2


def test_a_damaged_beginning_of_an_earlier_run_is_thrown_away(hub: FakeHub, tmp_path: Path) -> None:
    repository = pull(hub, tmp_path)
    (tmp_path / f"{SHARD}.part").write_bytes(bytes(200_000))
    assert repository.fetch(SHARD).read_bytes() == content(hub, SHARD)
    assert [r.first_byte for r in hub.downloads(SHARD)] == [200_000, 0]


@pytest.mark.parametrize("n_bytes", [300_000, 300_001])
def test_a_beginning_that_is_no_shorter_than_the_file_is_checked_too(
    hub: FakeHub, tmp_path: Path, n_bytes: int
) -> None:
    repository = pull(hub, tmp_path)
    (tmp_path / f"{SHARD}.part").write_bytes(bytes(n_bytes))
    assert repository.fetch(SHARD).read_bytes() == content(hub, SHARD)
    assert [r.first_byte for r in hub.downloads(SHARD)] == [0]


def test_a_whole_beginning_needs_no_request(hub: FakeHub, tmp_path: Path) -> None:
    repository = pull(hub, tmp_path)
    (tmp_path / f"{SHARD}.part").write_bytes(content(hub, SHARD))
    assert repository.fetch(SHARD).read_bytes() == content(hub, SHARD)
    assert hub.downloads(SHARD) == []


def test_a_shard_that_rotted_on_the_disk_is_fetched_again(hub: FakeHub, tmp_path: Path) -> None:
    path = pull(hub, tmp_path).fetch(SHARD)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert content(hub, SHARD)[-1:] != b"!"
    assert pull(hub, tmp_path).fetch(SHARD).read_bytes() == content(hub, SHARD)


@pytest.mark.parametrize("length", [0, 5, 299_999, 300_001])
def test_a_wrong_length_is_never_accepted(hub: FakeHub, tmp_path: Path, length: int) -> None:
    hub.faults[SHARD] = [Fault(body=bytes(length))] * 2
    # The library's word for a body that ends too early; ours for one that does not end.
    short, long = f"has size {length} ", "more than the 300,000 bytes"
    found = f"^{SHARD}: .*, because .*{short if length < 300_000 else long}"
    with pytest.raises(DownloadError, match=found):
        pull(hub, tmp_path, retry=Sleeps().policy(tries=2)).fetch(SHARD)
    assert not (tmp_path / SHARD).exists()
    assert pull(hub, tmp_path).fetch(SHARD).read_bytes() == content(hub, SHARD)


def test_a_login_page_does_not_become_part_of_the_file(hub: FakeHub, tmp_path: Path) -> None:
    page = Fault(body=b"<html>please log in</html>", without_range=True)
    hub.faults[SHARD] = [Fault(cut_after=260_000), page]
    assert pull(hub, tmp_path).fetch(SHARD).read_bytes() == content(hub, SHARD)
    assert hub.downloads(SHARD)[-1].first_byte == 0


@pytest.mark.parametrize("length", [5, 300_001])
def test_a_wrong_length_that_nobody_announced_is_noticed(
    hub: FakeHub, tmp_path: Path, length: int
) -> None:
    seen: list[DownloadProgress] = []
    hub.faults[SHARD] = [Fault(body=bytes(length), unannounced=True)]
    path = pull(hub, tmp_path, progress=seen.append).fetch(SHARD)
    assert path.read_bytes() == content(hub, SHARD)
    assert max(step.file_bytes_done for step in seen) == 300_000  # no more is ever written


def test_a_server_that_ignores_ranges_sends_the_file_again(hub: FakeHub, tmp_path: Path) -> None:
    hub.faults[SHARD] = [Fault(cut_after=260_000), Fault(without_range=True)]
    assert pull(hub, tmp_path).fetch(SHARD).read_bytes() == content(hub, SHARD)
    assert [r.bytes_sent for r in hub.downloads(SHARD)] == [260_000, 300_000]


@pytest.mark.parametrize("from_byte", [7, 299_000])
def test_an_answer_from_another_byte_is_noticed(
    hub: FakeHub, tmp_path: Path, from_byte: int
) -> None:
    hub.faults[SHARD] = [Fault(cut_after=260_000), Fault(from_byte=from_byte)]
    assert pull(hub, tmp_path).fetch(SHARD).read_bytes() == content(hub, SHARD)
    assert [r.first_byte for r in hub.downloads(SHARD)] == [0, CHUNK_BYTES, 0]


def test_a_hub_that_has_no_more_bytes_than_are_here_is_asked_anew(
    hub: FakeHub, tmp_path: Path
) -> None:
    hub.faults[SHARD] = [Fault(cut_after=260_000), Fault(from_byte=300_000)]
    assert pull(hub, tmp_path).fetch(SHARD).read_bytes() == content(hub, SHARD)


def test_a_file_beyond_what_the_hub_hands_out_is_named_before_any_shard_comes(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_commit(tiny_checkpoint() | {OTHER_SHARD: bytes(300_001)})
    monkeypatch.setattr(huggingface_hub.constants, "MAX_HTTP_DOWNLOAD_SIZE", 300_000)
    with pytest.raises(DownloadError, match=r"has 300,001 bytes, .* at most 300,000\."):
        pull(hub, tmp_path)
    assert [r.file for r in hub.requests if r.bytes_sent and r.server == "storage"] == []


def test_only_files_that_are_wanted_must_be_short_enough(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_commit(tiny_checkpoint() | {"consolidated.safetensors": bytes(300_001)})
    monkeypatch.setattr(huggingface_hub.constants, "MAX_HTTP_DOWNLOAD_SIZE", 300_000)
    assert pull(hub, tmp_path).fetch(SHARD).read_bytes() == content(hub, SHARD)


# When the hub refuses


def test_an_unknown_repository_is_a_usage_error(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(UnknownModelError, match="no repository acme/no-such on http") as caught:
        HubRepository("acme/no-such", folder=tmp_path / "new", endpoint=hub.endpoint)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "new").exists()


def test_a_commit_that_was_withdrawn_is_a_usage_error(hub: FakeHub, tmp_path: Path) -> None:
    repository = pull(hub, tmp_path)
    hub.faults[SHARD] = [Fault(status=404, headers=(("X-Error-Code", "RevisionNotFound"),))]
    with pytest.raises(UnknownModelError, match="knows no such revision"):
        repository.fetch(SHARD)


@pytest.mark.parametrize("repo_id", ["../../etc", "a/b/c", "", "a b", "x" * 99, "-a/b"])
def test_a_name_no_repository_can_have_is_refused_before_any_request(
    hub: FakeHub, tmp_path: Path, repo_id: str
) -> None:
    with pytest.raises(UnknownModelError, match="cannot be a hub repository"):
        HubRepository(repo_id, folder=tmp_path, endpoint=hub.endpoint)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("fault", "kind", "found"),
    [
        (
            GATED,
            DownloadError,
            r"gated or private \(403\).*licence at http.*/acme/tiny-moe.*HF_TOKEN",
        ),
        (Fault(status=403), DownloadError, r"gated or private \(403\)"),
        (Fault(status=401), DownloadError, r"gated or private \(401\)"),
        (NO_REPOSITORY, UnknownModelError, "set HF_TOKEN"),
        (
            Fault(
                status=401,
                headers=(("X-Error-Message", "Invalid credentials in Authorization header"),),
            ),
            DownloadError,
            r"gated or private \(401\).*valid token",
        ),
        (Fault(status=418), DownloadError, "the hub answered 418, expected 200 or 206"),
    ],
)
@pytest.mark.parametrize("key", ["api", SHARD])
def test_a_refusal_that_will_not_pass_is_not_retried(
    hub: FakeHub, tmp_path: Path, key: str, fault: Fault, kind: type[LowMoeError], found: str
) -> None:
    hub.faults[key] = [fault]
    sleeps = Sleeps()
    with pytest.raises(kind, match=found) as caught:
        pull(hub, tmp_path, retry=sleeps.policy()).fetch(SHARD)
    assert sleeps == []
    assert "hf_secret" not in str(caught.value)


def test_a_listed_file_that_is_not_there_is_named(hub: FakeHub, tmp_path: Path) -> None:
    missing = Fault(status=404, headers=(("X-Error-Code", "EntryNotFound"),))
    hub.faults[SHARD] = [missing]
    with pytest.raises(DownloadError, match=f"answered 404 for .*{SHARD}"):
        pull(hub, tmp_path).fetch(SHARD)


def test_the_token_goes_to_the_hub_and_to_nobody_else(hub: FakeHub, tmp_path: Path) -> None:
    repository = pull(hub, tmp_path)
    repository.fetch_small()
    repository.fetch(SHARD)
    tokens = {request.server: set() for request in hub.requests}
    for request in hub.requests:
        tokens[request.server].add(request.headers.get("authorization"))
    assert tokens == {"hub": {"Bearer hf_secret"}, "storage": {None}}


def test_the_hub_learns_no_more_than_our_name(hub: FakeHub, tmp_path: Path) -> None:
    pull(hub, tmp_path).fetch(SHARD)
    agents = {request.headers["user-agent"] for request in hub.requests}
    assert agents == {f"lowmoe; hf_hub/{huggingface_hub.__version__}"}


# When the list is not a list one can trust


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>", b"[]", b"{}", b"null", b'"x"', b'{"id": "x", "siblings": [{}]}', b"\xff\xfe"],
)
def test_an_answer_that_describes_no_model_is_refused(
    hub: FakeHub, tmp_path: Path, body: bytes
) -> None:
    hub.faults["api"] = [Fault(body=body)]
    with pytest.raises(DownloadError, match=r"is no hub \(.*Check HF_ENDPOINT"):
        pull(hub, tmp_path)


GOOD = {"rfilename": "model.safetensors", "size": 5, "blobId": "0" * 40}


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"size": None}, "its length is None"),
        ({"size": -1}, "its length is -1"),
        ({"size": "5"}, "its length is '5'"),
        ({"size": True}, "its length is True"),
        ({"blobId": "main"}, "its hash is 'main'"),
        ({"blobId": None}, "the hub gives no hash"),
        ({"lfs": {"sha256": "0" * 63, "size": 5, "pointerSize": 1}}, "its hash is '0"),
        ({"rfilename": 7}, "a file is named 7"),
    ],
)
def test_an_absurd_entry_of_the_list_is_refused(
    hub: FakeHub, tmp_path: Path, changed: dict[str, object], found: str
) -> None:
    hub.siblings = [GOOD | changed]
    with pytest.raises(DownloadError, match=found):
        pull(hub, tmp_path)


def test_a_name_listed_twice_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    hub.siblings = [GOOD, GOOD]
    with pytest.raises(DownloadError, match=r"lists model\.safetensors twice"):
        pull(hub, tmp_path)


def test_a_commit_that_is_none_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    hub.faults["api"] = [
        Fault(body=json.dumps({"id": "x", "sha": "../x", "siblings": []}).encode())
    ]
    with pytest.raises(DownloadError, match=r"names commit '\.\./x', expected 40 hex digits"):
        pull(hub, tmp_path)


HOSTILE_NAMES = [
    "../model.safetensors",
    "../../config.json",
    "/etc/model.safetensors",
    "a/../../model.safetensors",
    "a//model.safetensors",
    "..\\model.safetensors",
    "a\\model.safetensors",
    "C:model.safetensors",
    ".model.safetensors",
    ".safetensors",
    "model..safetensors",
    "model\n.safetensors",
    "model\0.safetensors",
    "\x1b[2Jmodel.safetensors",
    "x" * 250 + ".safetensors",
]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_name_that_could_leave_the_folder_is_refused(
    hub: FakeHub, tmp_path: Path, name: str
) -> None:
    hub.siblings = [GOOD, GOOD | {"rfilename": name}]
    with pytest.raises(DownloadError, match="this repository is refused") as caught:
        pull(hub, tmp_path)
    assert str(caught.value).isprintable()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_only_listed_names_are_fetched_or_deleted(hub: FakeHub, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "deep" / "er"
    repository = pull(hub, folder)
    bystander = tmp_path / "deep" / "model.safetensors"
    bystander.write_bytes(b"not ours")
    for act in (repository.fetch, repository.release):
        with pytest.raises(DownloadError, match="lists no file"):
            act(name)
    assert bystander.read_bytes() == b"not ours"


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"a.bin": b"", "b.bin": b"", "c.gguf": b""}, r"weights found: 2 \.bin, 1 \.gguf"),
        ({"README.md": b""}, "weights found: none"),
        ({"original/model.safetensors": b""}, "weights found: none"),
    ],
)
def test_a_repository_without_safetensors_is_named_for_what_it_holds(
    hub: FakeHub, tmp_path: Path, files: dict[str, bytes], found: str
) -> None:
    hub.add_commit(files)
    with pytest.raises(CheckpointError, match=found):
        pull(hub, tmp_path)


@pytest.mark.parametrize(
    ("index", "found"),
    [
        ("no", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "no usable weight_map"),
        ('{"weight_map": {}}', "no usable weight_map"),
        ('{"weight_map": {"t": 5}}', "no usable weight_map"),
        ('{"weight_map": {"t": "pull.json"}}', "no usable weight_map"),
        ('{"weight_map": {"t": "../x.safetensors"}}', r"needs '\.\./x\.safetensors', which"),
    ],
)
def test_an_index_that_contradicts_the_repository_is_refused(
    hub: FakeHub, tmp_path: Path, index: str, found: str
) -> None:
    hub.add_commit(tiny_checkpoint() | {"model.safetensors.index.json": index.encode()})
    with pytest.raises(CheckpointError, match=found):
        pull(hub, tmp_path)


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
