"""A GGUF file from the command line to its text: found, made into a folder, run as it is."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import lowmoe
from lowmoe.checkpoint.folder import ModelFolder
from lowmoe.engine.report import SilentReporter
from lowmoe.errors import CheckpointError, UnknownModelError
from lowmoe.library.configs import spec_of
from lowmoe.library.names import LocalCheckpoint, locate
from lowmoe.settings import read_settings
from tests.gguf_models import Writer, write_gguf
from tests.talking_mixtral import CHAT_TEMPLATE, learned_tokenizer

MESSAGES = [{"role": "user", "content": "Hello there"}]


class Notes(SilentReporter):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def add_tokenizer(writer: Writer) -> None:
    made = json.loads(learned_tokenizer().to_str())
    vocabulary = made["model"]["vocab"]
    special = {token["content"] for token in made["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in made["model"]["merges"]])
    writer.add_eos_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def file(talking_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """talking_checkpoint as one file."""
    path = tmp_path_factory.mktemp("gguf") / "talking.gguf"
    write_gguf(talking_checkpoint, path, more=add_tokenizer)
    return path


def test_it_runs_as_it_is_and_says_what_the_checkpoint_says(
    file: Path, talking_checkpoint: Path
) -> None:
    with (
        lowmoe.load(file, dtype="float32") as ours,
        lowmoe.load(talking_checkpoint, dtype="float32") as theirs,
    ):
        assert torch.equal(ours.logits([5, 6, 7]), theirs.logits([5, 6, 7]))
        for prompt in ("The sun", MESSAGES):
            wanted = theirs.generate(prompt, max_new_tokens=12, temperature=0.0)
            assert ours.generate(prompt, max_new_tokens=12, temperature=0.0) == wanted


def test_its_folder_is_the_checkpoints_folder(
    file: Path, talking_checkpoint: Path, tmp_path: Path
) -> None:
    for source, to in ((file, "ours"), (talking_checkpoint, "theirs")):
        lowmoe.quantize(source, tmp_path / to, bits=2)
    with ModelFolder(tmp_path / "ours") as ours, ModelFolder(tmp_path / "theirs") as theirs:
        assert ours.manifest.calibration == theirs.manifest.calibration
        assert list(ours.manifest.spans) == list(theirs.manifest.spans)
        for name in ours.manifest.spans:
            assert torch.equal(ours.read(name), theirs.read(name)), name
        assert ours.manifest.source.name == "talking.gguf"


def test_a_name_runs_it_and_makes_its_folder_once(file: Path, home: Path) -> None:
    report = Notes()
    for _ in range(2):
        with lowmoe.load(file, report=report) as model:
            assert model.generate(MESSAGES, max_new_tokens=3)
    [folder] = (home / "models").iterdir()
    assert folder.name.startswith("talking-")
    [said] = [note for note in report.notes if "quantized once" in note]
    assert str(folder) in said


def test_another_file_is_another_model(file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "talking.gguf"
    copy.write_bytes(file.read_bytes())
    before = LocalCheckpoint(copy).home_name
    assert before != LocalCheckpoint(file).home_name
    with copy.open("ab") as more:
        more.write(b"\0")
    assert LocalCheckpoint(copy).home_name != before


def test_a_file_that_is_not_there_is_not_taken_for_a_repository(home: Path) -> None:
    with pytest.raises(UnknownModelError, match=r"models/x\.gguf: there is no such file"):
        locate("models/x.gguf", read_settings())


def test_a_file_that_is_none_is_refused_in_one_line(tmp_path: Path, home: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(np.zeros(100, np.uint8).tobytes())
    with pytest.raises(CheckpointError, match=r"x\.gguf: does not begin with GGUF"):
        lowmoe.load(tmp_path / "x.gguf")


def test_it_is_planned_for_as_the_checkpoint_is(
    file: Path, talking_checkpoint: Path, home: Path
) -> None:
    settings = read_settings()
    ours, theirs = (spec_of(str(path), settings) for path in (file, talking_checkpoint))
    assert ours.n_parameters == theirs.n_parameters
    assert ours.n_experts_by_layer == theirs.n_experts_by_layer
