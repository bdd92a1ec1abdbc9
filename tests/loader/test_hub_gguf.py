"""Does a pull of a repository of GGUF files end with one model's, and nothing else?"""

import os
from pathlib import Path

import pytest

from lowmoe.errors import DownloadError, UnknownModelError
from tests.loader.fake_hub import FakeHub, Fault, tiny_checkpoint
from tests.loader.hub_pulls import CHUNK_BYTES, pull

pytestmark = pytest.mark.usefixtures("library_sleeps", "fresh_client")

PARTS = [f"m-Q8_0-0000{part}-of-00002.gguf" for part in (1, 2)]


@pytest.fixture
def gguf_hub() -> FakeHub:
    hub = FakeHub()
    sizes = {**{f"Q8_0/{part}": 6 for part in PARTS}, "m.Q2_K.gguf": 2, "mmproj-F16.gguf": 1}
    hub.add_commit(
        {name: os.urandom(n * CHUNK_BYTES) for name, n in sizes.items()}
        | {"config.json": b"{}", "README.md": b"# m\n"}
    )
    return hub


def test_one_models_files_are_listed_and_fetched(gguf_hub: FakeHub, tmp_path: Path) -> None:
    with gguf_hub as hub:
        repository = pull(hub, tmp_path)
        assert [file.name for file in repository.files] == PARTS
        assert repository.choice is not None
        assert repository.choice.startswith(f"Q8_0/{PARTS[0]} and 1 more: the shortest of 8 bits")
        for name in PARTS:
            wanted = hub.commits[hub.branches["main"]][f"Q8_0/{name}"]
            assert repository.fetch(name).read_bytes() == wanted
        assert {r.file for r in hub.requests if r.bytes_sent and "resolve" in r.path} <= {*PARTS}


def test_the_choice_is_kept_for_the_next_run(gguf_hub: FakeHub, tmp_path: Path) -> None:
    with gguf_hub as hub:
        first = pull(hub, tmp_path, kind="Q2_K")
        hub.add_commit({"m.Q4_0.gguf": b"another"})
        second = pull(hub, tmp_path, kind="Q2_K")
    assert (second.choice, second.files) == (first.choice, first.files)
    assert first.choice == "m.Q2_K.gguf: as asked"


def test_safetensors_are_taken_where_there_are_some_and_no_kind_was_asked(tmp_path: Path) -> None:
    with FakeHub() as hub:
        hub.add_commit(tiny_checkpoint() | {"m.Q8_0.gguf": b"GGUF"})
        assert pull(hub, tmp_path / "a").choice is None
        asked = pull(hub, tmp_path / "b", kind="q8_0")
        assert [file.name for file in asked.files] == ["m.Q8_0.gguf"]
        with pytest.raises(UnknownModelError, match="no GGUF file of kind 'Q2_K', but Q8_0"):
            pull(hub, tmp_path / "c", kind="Q2_K")


def test_a_beginning_is_fetched_and_the_whole_goes_on_behind_it(
    gguf_hub: FakeHub, tmp_path: Path
) -> None:
    with gguf_hub as hub:
        repository = pull(hub, tmp_path)
        part = repository.fetch_beginning(PARTS[0], 2 * CHUNK_BYTES)
        whole = hub.commits[hub.branches["main"]][f"Q8_0/{PARTS[0]}"]
        here = part.read_bytes()
        assert 2 * CHUNK_BYTES <= len(here) < len(whole)
        assert here == whole[: len(here)]
        assert repository.fetch_beginning(PARTS[0], CHUNK_BYTES) == part
        assert repository.fetch(PARTS[0]).read_bytes() == whole
        assert hub.downloads(PARTS[0])[-1].first_byte == len(here)
        assert repository.fetch_beginning(PARTS[0], CHUNK_BYTES).read_bytes() == whole
        assert repository.fetch_beginning(PARTS[1], 10**9).stat().st_size == len(whole)


def test_a_beginning_that_does_not_come_is_a_download_error(
    gguf_hub: FakeHub, tmp_path: Path
) -> None:
    with gguf_hub as hub:
        repository = pull(hub, tmp_path)
        hub.faults[f"Q8_0/{PARTS[0]}"] = [
            Fault(status=404, headers=(("X-Error-Code", "EntryNotFound"),))
        ]
        with pytest.raises(DownloadError, match="answered 404"):
            repository.fetch_beginning(PARTS[0], CHUNK_BYTES)


@pytest.mark.parametrize("name", ["../m.Q8_0.gguf", "a/../m.Q8_0.gguf", "/etc/m.Q8_0.gguf"])
def test_a_folder_that_could_lead_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    with FakeHub() as hub:
        hub.siblings = [{"rfilename": name, "size": 5, "blobId": "0" * 40}]
        hub.add_commit({})
        with pytest.raises(DownloadError, match="could reach outside the folder"):
            pull(hub, tmp_path)
