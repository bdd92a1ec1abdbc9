"""What names stand for, what is kept in the home, and what must fit before work begins."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
from filelock import FileLock

from lowmoe.checkpoint import files
from lowmoe.checkpoint.folder import ModelFolder
from lowmoe.engine.report import SilentReporter
from lowmoe.errors import (
    CheckpointError,
    DiskSpaceError,
    FolderError,
    TextError,
    UnknownModelError,
    UsageError,
)
from lowmoe.families.aliases import ALIASES
from lowmoe.library import making
from lowmoe.library.calibration import section_tokens
from lowmoe.library.making import prepare, pull, quantize_checkpoint
from lowmoe.library.names import (
    HubModel,
    LocalCheckpoint,
    LocalFolder,
    demo_folder,
    find_installed,
    installed,
    locate,
    locked,
    models_home,
    remove,
)
from lowmoe.library.options import MakeOptions
from lowmoe.library.verify import verify
from lowmoe.loader.hub import HubRepository, RetryPolicy
from lowmoe.settings import Settings
from tests.loader.fake_hub import FakeHub
from tests.talking_mixtral import change_json, copy_of

QUICK = MakeOptions(bits=2, calibrate=False)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home")


def put_in_home(settings: Settings, name: str, model_folder: Path) -> Path:
    return copy_of(model_folder, models_home(settings) / name)


# --- names


def test_a_name_stands_for_the_demo_a_path_an_alias_or_a_repository(
    settings: Settings, model_folder: Path, talking_checkpoint: Path
) -> None:
    assert locate("demo", settings) == LocalFolder(demo_folder())
    assert locate(str(model_folder), settings) == LocalFolder(model_folder)
    assert locate(str(talking_checkpoint), settings) == LocalCheckpoint(talking_checkpoint)
    assert locate("owner/model-1.5_x", settings) == HubModel("owner/model-1.5_x")
    for alias, meaning in ALIASES.items():
        assert locate(alias, settings) == HubModel(meaning.repository)


def test_what_was_pulled_goes_by_alias_repository_and_listed_name(
    settings: Settings, model_folder: Path
) -> None:
    repository = ALIASES["mixtral-8x7b"].repository
    listed = repository.replace("/", "--")
    folder = put_in_home(settings, listed, model_folder)
    for name in ("mixtral-8x7b", repository, listed):
        assert locate(name, settings) == LocalFolder(folder)
        assert find_installed(name, settings).path == folder


def test_a_pull_that_is_unfinished_still_stands_for_the_repository(
    settings: Settings, model_folder: Path
) -> None:
    repository = ALIASES["mixtral-8x7b"].repository
    folder = put_in_home(settings, repository.replace("/", "--"), model_folder)
    (folder / "manifest.json").unlink()
    assert locate("mixtral-8x7b", settings) == HubModel(repository)
    assert find_installed("mixtral-8x7b", settings).finished is False


def test_a_path_may_begin_with_the_users_home(
    settings: Settings, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(model_folder.parent))
    assert locate(f"~/{model_folder.name}", settings) == LocalFolder(model_folder)


@pytest.mark.parametrize(
    "name", ["no-such-model", "/no/such/path", "a/b/c", "../no-such-folder", "a b/c"]
)
def test_anything_else_is_unknown(settings: Settings, name: str) -> None:
    with pytest.raises(UnknownModelError, match="is no alias, no hub repository"):
        locate(name, settings)


def test_names_that_look_alike_are_offered(settings: Settings) -> None:
    with pytest.raises(UnknownModelError, match="Did you mean mixtral-8x22b"):
        locate("Mixtral-8x22", settings)
    with pytest.raises(UnknownModelError) as unknown:
        locate("zzzz", settings)
    assert "Did you mean" not in str(unknown.value)


def test_a_folder_that_is_neither_says_what_is_missing(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(FolderError, match=r"neither manifest\.json .* nor config\.json"):
        locate(str(tmp_path), settings)


def test_a_checkpoints_folder_in_the_home_is_another_once_a_file_changed(
    talking_checkpoint: Path, tmp_path: Path
) -> None:
    folder = copy_of(talking_checkpoint, tmp_path / "checkpoint")
    before = LocalCheckpoint(folder).home_name
    (folder / "notes.txt").write_text("no part of the model")
    assert LocalCheckpoint(folder).home_name == before
    for name in ("model.safetensors", "config.json", "chat_template.jinja"):
        os.utime(folder / name, ns=(1, 1))
        assert LocalCheckpoint(folder).home_name != before
        before = LocalCheckpoint(folder).home_name
    assert before.startswith("checkpoint-")


# --- the home


def test_the_home_lists_finished_and_unfinished_models_by_name(
    settings: Settings, model_folder: Path
) -> None:
    assert installed(settings) == []
    put_in_home(settings, "b", model_folder)
    unfinished = put_in_home(settings, "a", model_folder)
    (unfinished / "manifest.json").unlink()
    (models_home(settings) / "stray.txt").write_text("")
    n_bytes = sum(f.stat().st_size for f in model_folder.iterdir())
    found = installed(settings)
    assert [(m.name, m.finished) for m in found] == [("a", False), ("b", True)]
    assert found[1].n_bytes == n_bytes


def test_removing_takes_the_model_and_what_its_pull_had_under_way(
    settings: Settings, model_folder: Path
) -> None:
    put_in_home(settings, "gone", model_folder)
    put_in_home(settings, "kept", model_folder)
    work = settings.home / "work" / "gone"
    work.mkdir(parents=True)
    (work / "shard.part").write_bytes(b"half")
    remove(find_installed("gone", settings), settings)
    assert [m.name for m in installed(settings)] == ["kept"]
    assert not work.exists()
    assert sorted(p.name for p in models_home(settings).iterdir()) == ["kept"]


def test_what_a_pull_left_before_there_was_a_folder_is_listed_and_removed(
    settings: Settings,
) -> None:
    work = settings.home / "work" / "begun"
    work.mkdir(parents=True)
    (work / "shard.part").write_bytes(b"half")
    (found,) = installed(settings)
    assert (found.name, found.path, found.n_bytes, found.finished) == ("begun", work, 4, False)
    remove(find_installed("begun", settings), settings)
    assert not work.exists()
    assert installed(settings) == []


def test_a_pull_under_way_is_not_removed(hub: FakeHub, settings: Settings) -> None:
    class Removing(SilentReporter):
        def step(self, stage: str, done: int, total: int, unit: str) -> None:
            remove(find_installed("new", settings), settings)

    folder = models_home(settings) / "new"
    with pytest.raises(FolderError, match="another lowmoe is making or removing it"):
        pull(HubModel(hub.repo_id), folder, settings, QUICK, Removing())
    assert (settings.home / "work" / "new" / "pull.json").is_file()


def test_a_name_outside_the_home_is_never_removed(settings: Settings, model_folder: Path) -> None:
    put_in_home(settings, "a", model_folder)
    for name in ("..", ".", "../work", str(model_folder), "", "b"):
        with pytest.raises(UnknownModelError, match=r"is not among the models in .*: a\."):
            find_installed(name, settings)


def test_a_model_in_the_making_is_not_removed(settings: Settings, model_folder: Path) -> None:
    folder = put_in_home(settings, "busy", model_folder)
    with (
        FileLock(folder.with_name("busy.lock")),
        pytest.raises(FolderError, match="another lowmoe is making or removing it"),
    ):
        remove(find_installed("busy", settings), settings)
    assert (folder / "manifest.json").is_file()


def test_a_lock_that_was_let_go_while_another_asked_for_it_is_not_held_on_a_file_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")  # Windows removes no open file
    folder, flock, ending = tmp_path / "busy", fcntl.flock, ExitStack()
    ending.enter_context(locked(folder))

    def once_opened(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        ending.close()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", once_opened)
    with pytest.raises(FolderError, match="another lowmoe is making"), locked(folder):
        pass
    with locked(folder):
        assert folder.with_name("busy.lock").is_file()


def test_letting_go_of_a_lock_leaves_the_next_ones_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, unlink, following = tmp_path / "busy", Path.unlink, ExitStack()

    def followed(path: Path) -> None:
        monkeypatch.setattr(Path, "unlink", unlink)
        unlink(path)
        following.enter_context(locked(folder))

    with locked(folder):
        monkeypatch.setattr(Path, "unlink", followed)
    with following:
        assert folder.with_name("busy.lock").is_file()
        with pytest.raises(FolderError, match="another lowmoe is making"), locked(folder):
            pass


# --- making


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"bits": 5}, "bits is 5, but must be 2, 4 or 6"),
        ({"format": "gguf"}, "format is 'gguf', but must be one of trellis, nf4, bf16"),
        ({"threads": 0}, "threads is 0, but must be at least 1"),
        ({"calibration": Path("x"), "calibrate": False}, "calibrating is switched off"),
    ],
)
def test_making_options_that_cannot_be_honoured_are_usage_errors(
    changes: dict[str, object], complaint: str
) -> None:
    with pytest.raises(UsageError, match=complaint):
        replace(MakeOptions(), **changes)  # type: ignore[arg-type]


def test_no_lock_is_left_beside_what_was_made(talking_checkpoint: Path, tmp_path: Path) -> None:
    quantize_checkpoint(talking_checkpoint, tmp_path / "new", QUICK, SilentReporter())
    assert [p.name for p in tmp_path.iterdir()] == ["new"]


def test_an_interrupted_conversion_is_gone_on_with(
    talking_checkpoint: Path, tmp_path: Path
) -> None:
    class Interrupting(SilentReporter):
        def step(self, stage: str, done: int, total: int, unit: str) -> None:
            if done > total / 2:
                raise KeyboardInterrupt

    folder, whole = tmp_path / "new", tmp_path / "whole"
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(talking_checkpoint, folder, QUICK, Interrupting())
    with pytest.raises(FolderError, match="an unfinished conversion of another checkpoint"):
        quantize_checkpoint(talking_checkpoint, folder, MakeOptions(bits=4), SilentReporter())
    quantize_checkpoint(talking_checkpoint, folder, QUICK, SilentReporter())
    quantize_checkpoint(talking_checkpoint, whole, QUICK, SilentReporter())
    assert contents(folder) == contents(whole)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_checkpoint_is_made_into_the_home_once(
    settings: Settings, talking_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    located = LocalCheckpoint(talking_checkpoint)
    folder = prepare(located, settings, QUICK, SilentReporter())
    assert folder == models_home(settings) / located.home_name
    monkeypatch.setattr(making, "quantize_checkpoint", None)  # not called again
    assert prepare(located, settings, QUICK, SilentReporter()) == folder


def test_skipping_calibration_is_said_to_cost_quality(
    talking_checkpoint: Path, tmp_path: Path
) -> None:
    notes: list[str] = []

    class Noting(SilentReporter):
        def note(self, text: str) -> None:
            notes.append(text)

    quantize_checkpoint(talking_checkpoint, tmp_path / "a", QUICK, Noting())
    quantize_checkpoint(talking_checkpoint, tmp_path / "b", replace(QUICK, format="bf16"), Noting())
    assert ["without calibration" in note for note in notes] == [True, False, False]


def test_calibration_tokens_are_recorded_and_come_from_the_given_text(
    talking_checkpoint: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text"
    text.write_text("abc " * 40)
    options = MakeOptions(bits=2, calibration=text)
    quantize_checkpoint(talking_checkpoint, tmp_path / "new", options, SilentReporter())
    with ModelFolder(tmp_path / "new") as folder:
        calibration = folder.manifest.calibration
    assert calibration is not None
    assert 40 <= calibration.n_tokens <= 160


def test_a_tokenizer_of_another_model_is_noticed(talking_checkpoint: Path, tmp_path: Path) -> None:
    folder = copy_of(talking_checkpoint, tmp_path / "mixed")
    change_json(folder / "config.json", vocab_size=40)
    with pytest.raises(TextError, match=r"token id \d+, but config\.json has a vocabulary of 40"):
        quantize_checkpoint(folder, tmp_path / "new", MakeOptions(), SilentReporter())
    assert not (tmp_path / "new").exists()


def test_sections_share_the_tokens_evenly_and_keep_their_order() -> None:
    sections = [[1] * 10, [2] * 2, [3] * 10]
    taken = section_tokens(sections, 12)
    assert taken == [1] * 5 + [2] * 2 + [3] * 5
    assert section_tokens(sections, 100) == [1] * 10 + [2] * 2 + [3] * 10
    assert section_tokens([], 5) == []


# --- pulling


@pytest.fixture
def hub(talking_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.close_session()  # one a process, with its view of the proxy
    with FakeHub() as hub:
        hub.add_commit({p.name: p.read_bytes() for p in talking_checkpoint.iterdir()})
        there = partial(HubRepository, endpoint=hub.endpoint, retry=RetryPolicy(tries=1))
        monkeypatch.setattr(making, "HubRepository", there)
        yield hub
    huggingface_hub.close_session()


def test_a_pulled_model_is_that_of_the_checkpoint_and_leaves_no_shard(
    hub: FakeHub, settings: Settings, talking_checkpoint: Path, tmp_path: Path
) -> None:
    located = locate(hub.repo_id, settings)
    folder = prepare(located, settings, QUICK, SilentReporter())
    quantize_checkpoint(talking_checkpoint, tmp_path / "local", QUICK, SilentReporter())
    pulled, local = contents(folder), contents(tmp_path / "local")
    for files_of in (pulled, local):
        files_of.pop("manifest.json")  # tells where the model came from
    assert pulled == local
    with ModelFolder(folder) as opened:
        assert opened.manifest.source.name == hub.repo_id
        assert opened.manifest.source.commit == hub.branches["main"]
    assert not list((settings.home / "work").rglob("*.safetensors"))
    assert locate(hub.repo_id, settings) == LocalFolder(folder)


@pytest.fixture
def left(hub: FakeHub, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a pull left that was ended when its folder was finished; the folder."""

    def killed(repository: HubRepository) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as ending:
        ending.setattr(HubRepository, "forget", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(HubModel(hub.repo_id), settings, QUICK, SilentReporter())
    (found,) = (settings.home / "work").iterdir()
    assert (found / "pull.json").is_file()
    return found


def test_what_a_pull_left_in_its_last_moments_goes_once_the_model_is_named_again(
    left: Path, hub: FakeHub, settings: Settings
) -> None:
    folder = models_home(settings) / left.name
    for located in (HubModel(hub.repo_id), locate(hub.repo_id, settings)):
        left.mkdir(exist_ok=True)
        assert prepare(located, settings, QUICK, SilentReporter()) == folder
        assert not left.exists()
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_a_model_runs_while_another_lowmoe_deletes_what_its_pull_left(
    left: Path, hub: FakeHub, settings: Settings
) -> None:
    folder = models_home(settings) / left.name
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        assert prepare(HubModel(hub.repo_id), settings, QUICK, SilentReporter()) == folder
    assert left.is_dir()


def test_a_folder_elsewhere_deletes_no_pull_of_its_name(
    settings: Settings, model_folder: Path, tmp_path: Path
) -> None:
    work = settings.home / "work" / "owner--model"
    work.mkdir(parents=True)
    elsewhere = LocalFolder(copy_of(model_folder, tmp_path / "owner--model"))
    prepare(elsewhere, settings, QUICK, SilentReporter())
    assert work.is_dir()


def test_a_pull_of_a_model_without_a_chat_template_says_so(
    hub: FakeHub, settings: Settings, talking_checkpoint: Path
) -> None:
    class Listening(SilentReporter):
        def note(self, text: str) -> None:
            notes.append(text)

    notes: list[str] = []
    prepare(locate(hub.repo_id, settings), settings, QUICK, Listening())
    assert not any("no chat template" in note for note in notes)
    kept = {p.name: p.read_bytes() for p in talking_checkpoint.iterdir()}
    del kept["chat_template.jinja"]
    hub.add_commit(kept)
    pull(HubModel(hub.repo_id), models_home(settings) / "silent", settings, QUICK, Listening())
    assert any("has no chat template" in note for note in notes)


def test_a_pull_that_cannot_fit_ends_before_the_first_shard(
    hub: FakeHub, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda path: 1000)
    folder = models_home(settings) / "new"
    with pytest.raises(DiskSpaceError, match=r"needs \d+ bytes of free disk, but 1000 are free"):
        pull(HubModel(hub.repo_id), folder, settings, QUICK, SilentReporter())
    assert hub.downloads("model.safetensors") == []
    assert not folder.exists()


# --- verify


def test_verify_reads_every_span_and_tells_how_far_it_is(model_folder: Path) -> None:
    steps: list[tuple[int, int]] = []
    with ModelFolder(model_folder) as folder:
        verify(folder, lambda done, total: steps.append((done, total)))
        n_spans = len(folder.manifest.spans)
    assert len(steps) == n_spans
    assert steps[-1][0] == steps[-1][1]


def test_verify_finds_a_flipped_bit_wherever_it_is(model_folder: Path, tmp_path: Path) -> None:
    folder = copy_of(model_folder, tmp_path / "model")
    with ModelFolder(folder) as opened:
        n_small = len(opened.manifest.small_files)
    assert n_small == 4
    for path in sorted(p for p in folder.iterdir() if p.name != "manifest.json"):
        data = path.read_bytes()
        for place in (0, min(100, len(data) // 3), len(data) // 2, len(data) - 1):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            with ModelFolder(folder) as opened, pytest.raises((FolderError, CheckpointError)) as e:
                verify(opened, lambda done, total: None)
            assert path.name in str(e.value)
        path.write_bytes(data)
    with ModelFolder(folder) as opened:
        verify(opened, lambda done, total: None)
