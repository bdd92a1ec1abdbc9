"""A repository of GGUF files alone, from its name to a model folder of the file that is best."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest

from lowmoe.checkpoint import files
from lowmoe.checkpoint.folder import ModelFolder
from lowmoe.errors import CheckpointError, DiskSpaceError, UnsupportedModelError
from lowmoe.families.aliases import ALIASES
from lowmoe.library import configs, making
from lowmoe.library.configs import spec_of
from lowmoe.library.making import prepare, pull, quantize_checkpoint
from lowmoe.library.names import HubModel, LocalFolder, find_installed, locate, remove
from lowmoe.library.options import MakeOptions
from lowmoe.loader.hub import HubRepository, RetryPolicy
from lowmoe.settings import Settings
from tests.gguf_models import Type, write_gguf
from tests.loader.fake_hub import FakeHub
from tests.test_gguf import Notes, add_tokenizer

QUICK = MakeOptions(bits=2, calibrate=False)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home")


@pytest.fixture(scope="module")
def uploads(talking_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The same model twice: in one file of 16 bits, and in parts of 32."""
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(talking_checkpoint, folder / "talking-F16.gguf", type=Type.F16, more=add_tokenizer)
    write_gguf(talking_checkpoint, folder / "talking-F32.gguf", split=20, more=add_tokenizer)
    named = {
        p.name if "F16" in p.name else f"F32/{p.name}": p.read_bytes() for p in folder.iterdir()
    }
    assert len(named) > 2
    return named | {"README.md": b"# talking\n", "mmproj-F32.gguf": b"GGUF"}


@pytest.fixture
def hub(uploads: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.close_session()  # one a process, with its view of the proxy
    with FakeHub(repo_id="acme/talking-GGUF") as hub:
        hub.add_commit(uploads)
        there = partial(HubRepository, endpoint=hub.endpoint, retry=RetryPolicy(tries=1))
        for module in (making, configs):
            monkeypatch.setattr(module, "HubRepository", there)
        yield hub
    huggingface_hub.close_session()


def contents(folder: Path) -> dict[str, bytes]:
    """But for the manifest, which tells where the model came from."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "manifest.json"}


@pytest.mark.parametrize(
    ("name", "parts", "why"),
    [
        ("acme/talking-GGUF", ["talking-F16.gguf"], "the shortest of 8 bits or more"),
        ("acme/talking-GGUF:f32", ["F32/talking-F32-00001-of"], "and 1 more: as asked"),
    ],
    ids=["any", "in parts, of the kind asked for"],
)
def test_a_pulled_model_is_that_of_the_file(
    hub: FakeHub, settings: Settings, uploads: dict[str, bytes], tmp_path: Path,
    name: str, parts: list[str], why: str,
) -> None:  # fmt: skip
    report = Notes()
    folder = prepare(locate(name, settings), settings, QUICK, report)
    chosen = sorted(n for n in uploads if n.startswith(parts[0][:7]))
    for upload in chosen:
        (tmp_path / Path(upload).name).write_bytes(uploads[upload])
    first = tmp_path / Path(chosen[0]).name
    quantize_checkpoint(first, tmp_path / "local", QUICK, Notes())
    assert contents(folder) == contents(tmp_path / "local")
    with ModelFolder(folder) as opened:
        assert opened.manifest.source.name == hub.repo_id
        assert opened.manifest.source.commit == hub.branches["main"]
    told = next(note for note in report.notes if "takes" in note)
    assert told.startswith(f"{hub.repo_id}: takes {chosen[0].partition('-of-')[0]}")
    assert why in told
    assert not list((settings.home / "work").rglob("*.gguf*"))


def test_a_model_goes_by_its_kind_in_the_home(hub: FakeHub, settings: Settings) -> None:
    asked, any_kind = "acme/talking-GGUF:F16", "acme/talking-GGUF"
    folder = prepare(locate(asked, settings), settings, QUICK, Notes())
    assert folder.name == "acme--talking-GGUF--F16"
    for name in (asked, asked.lower().replace("acme/talking-gguf", any_kind), folder.name):
        assert locate(name, settings) == LocalFolder(folder)
    assert locate(any_kind, settings) == HubModel(any_kind)
    remove(find_installed(asked, settings), settings)
    assert locate(asked, settings) == HubModel(any_kind, "F16")


def test_an_alias_may_be_given_with_a_kind(settings: Settings) -> None:
    repository = ALIASES["apus-xdan-4.0-gguf"].repository
    assert locate("apus-xdan-4.0-gguf:q2_k", settings) == HubModel(repository, "Q2_K")


@pytest.mark.parametrize("kind", ["", ":F32"])
def test_a_plan_knows_the_shape_by_beginnings_alone(
    hub: FakeHub, settings: Settings, talking_checkpoint: Path, kind: str
) -> None:
    found, wanted = (
        spec_of(hub.repo_id + kind, settings),
        spec_of(str(talking_checkpoint), settings),
    )
    assert found.n_parameters == wanted.n_parameters
    assert [x.feed_forward for x in found.layers] == [x.feed_forward for x in wanted.layers]


def test_a_pull_that_cannot_fit_ends_once_the_header_is_here(
    hub: FakeHub, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda path: 1000)
    folder = settings.home / "models" / "new"
    with pytest.raises(DiskSpaceError, match=r"needs \d+ bytes of free disk, but 1000 are free"):
        pull(HubModel(hub.repo_id), folder, settings, QUICK, Notes())
    assert not folder.exists()


def test_what_is_no_gguf_file_is_refused(hub: FakeHub, settings: Settings) -> None:
    hub.add_commit({"m-Q8_0.gguf": b"PK" * 50})
    with pytest.raises(CheckpointError, match="does not begin with GGUF"):
        prepare(locate(hub.repo_id, settings), settings, QUICK, Notes())


def test_a_header_without_an_end_is_refused(
    hub: FakeHub, settings: Settings, uploads: dict[str, bytes]
) -> None:
    hub.add_commit({"m-Q8_0.gguf": uploads["talking-F16.gguf"][:500]})
    with pytest.raises(CheckpointError, match=r"m-Q8_0\.gguf|header claims"):
        prepare(locate(hub.repo_id, settings), settings, QUICK, Notes())


def test_a_family_nobody_implemented_is_refused_by_name(
    hub: FakeHub, settings: Settings, uploads: dict[str, bytes]
) -> None:
    other = uploads["talking-F16.gguf"].replace(b"llama", b"mamba")
    hub.add_commit({"m-Q8_0.gguf": other})
    with pytest.raises(UnsupportedModelError, match="architecture is 'mamba'"):
        prepare(locate(hub.repo_id, settings), settings, QUICK, Notes())
