"""Is a pull refused by name, whatever a hub and its lists claim?"""

import json
from pathlib import Path

import huggingface_hub
import pytest

from lowmoe.errors import (
    CheckpointError,
    DownloadError,
    LowMoeError,
    UnknownModelError,
)
from lowmoe.loader.hub import HubRepository
from tests.loader.fake_hub import (
    GATED,
    NO_REPOSITORY,
    FakeHub,
    Fault,
    tiny_checkpoint,
)
from tests.loader.hub_pulls import SHARD, Sleeps, pull

pytestmark = pytest.mark.usefixtures("library_sleeps", "fresh_client")


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


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "tokenizer.json"])
def test_a_file_without_weights_that_would_fill_memory_is_refused_before_it_is_fetched(
    hub: FakeHub, tmp_path: Path, name: str
) -> None:
    hub.siblings = [GOOD | {"size": 2**40}, GOOD | {"rfilename": name, "size": 2**28 + 1}]
    with pytest.raises(DownloadError, match=rf"{name} has 268,435,457 bytes, .* 268,435,456 of"):
        pull(hub, tmp_path)
    assert hub.downloads(name) == []
    assert list(tmp_path.iterdir()) == []


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
        ({"a.bin": b"", "b.bin": b"", "c.pt": b""}, r"weights found: 2 \.bin, 1 \.pt\)"),
        ({"ckpt-0/tensor00000_000": b"", "run.py": b""}, r"weights found: 1 pickles of JAX"),
        ({"mmproj-F16.gguf": b"", "imatrix.gguf": b""}, "weights found: none"),
        ({"README.md": b""}, "weights found: none"),
        ({"original/model.safetensors": b""}, "weights found: none"),
    ],
)
def test_a_repository_of_other_weights_is_named_for_what_it_holds(
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
