"""Does a pull outlive lines that break, hubs that are busy, content that is wrong?"""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest

from lowmoe.errors import (
    DownloadError,
)
from lowmoe.loader.hub import DownloadProgress, HubRepository
from tests.loader.fake_hub import (
    FakeHub,
    Fault,
    git_blob_id,
    tiny_checkpoint,
)
from tests.loader.hub_pulls import CHUNK_BYTES, MEGABYTE, OTHER_SHARD, SHARD, Sleeps, content, pull

pytestmark = pytest.mark.usefixtures("library_sleeps", "fresh_client")


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
