"""Whatever is wrong is one line on stderr and an exit code; nothing is left half-written."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

import lowmoe
from lowmoe.checkpoint import files
from lowmoe.plan.memo import NAME
from tests.cli.conftest import RunCommand
from tests.talking_mixtral import CONFIG, CONTEXT, change_json, copy_of


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What a case may use and spoil."""

    tmp: Path
    talking: Path
    mute: Path
    model: Path
    patch: pytest.MonkeyPatch

    def checkpoint(self, **config: Any) -> Path:
        """A checkpoint of the case's own, its config changed."""
        folder = copy_of(self.talking, self.tmp / "checkpoint")
        change_json(folder / "config.json", **config)
        return folder

    def spoiled(self, original: Path, name: str, data: bytes) -> Path:
        """A copy of a folder with one file replaced."""
        folder = copy_of(original, self.tmp / "spoiled")
        (folder / name).write_bytes(data)
        return folder

    def written(self, name: str, text: str) -> Path:
        (self.tmp / name).write_text(text)
        return self.tmp / name

    def two_bits(self) -> Path:
        lowmoe.quantize(self.talking, self.tmp / "two", bits=2, calibrate=False)
        return self.tmp / "two"

    def nf4(self) -> Path:
        lowmoe.quantize(self.talking, self.tmp / "nf4", format="nf4", calibrate=False)
        return self.tmp / "nf4"

    def without_template(self) -> Path:
        plain = copy_of(self.talking, self.tmp / "checkpoint", without="chat_template.jinja")
        lowmoe.quantize(plain, self.tmp / "plain", bits=2, calibrate=False)
        return self.tmp / "plain"

    def muted(self) -> Path:
        lowmoe.quantize(self.mute, self.tmp / "muted", bits=2, calibrate=False)
        return self.tmp / "muted"


@pytest.fixture
def world(
    tmp_path: Path,
    talking_checkpoint: Path,
    mute_checkpoint: Path,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> World:
    return World(
        tmp=tmp_path,
        talking=talking_checkpoint,
        mute=mute_checkpoint,
        model=model_folder,
        patch=monkeypatch,
    )


Arguments = Callable[[World], list[object]]


@dataclass(frozen=True, slots=True)
class Case:
    """arguments: of the command, once the world is as the case wants it; match: of the line."""

    name: str
    arguments: Arguments
    code: int
    match: str
    stdin: str = ""


def run(model: object, *options: object) -> list[object]:
    return ["run", model, "--prompt", "Once", "--max-new-tokens", "2", *options]


# --- worlds that take more than an expression


def with_isa(name: str, *command: str) -> Arguments:
    def arguments(w: World) -> list[object]:
        w.patch.setenv("LOWMOE_ISA", name)
        return list(command) if command else run(w.model)

    return arguments


def claims_more_than_it_holds(w: World) -> list[object]:
    weights = (w.talking / "model.safetensors").read_bytes()
    huge = (len(weights) * 2).to_bytes(8, "little") + weights[8:]
    return run(w.spoiled(w.talking, "model.safetensors", huge))


def cut_short(w: World) -> list[object]:
    weights = (w.talking / "model.safetensors").read_bytes()
    return run(w.spoiled(w.talking, "model.safetensors", weights[:-100]))


def made_by_a_newer_version(w: World) -> list[object]:
    folder = copy_of(w.model, w.tmp / "newer")
    change_json(folder / "manifest.json", version=99)
    return run(folder)


def edited_manifest(w: World) -> list[object]:
    folder = copy_of(w.model, w.tmp / "edited")
    change_json(folder / "manifest.json", calibration=None)
    return run(folder)


def experts_file_is_gone(w: World) -> list[object]:
    folder = copy_of(w.model, w.tmp / "gone")
    (folder / "experts-plane1-00001.safetensors").unlink()
    return run(folder)


def one_bit_flipped(w: World) -> list[object]:
    name = "experts-plane0-00001.safetensors"
    data = bytearray((w.model / name).read_bytes())
    data[-5000] ^= 4
    return run(w.spoiled(w.model, name, bytes(data)))


def header_bit_flipped(w: World) -> list[object]:
    name = "dense.safetensors"
    data = (w.model / name).read_bytes()
    folder = w.spoiled(w.model, name, data.replace(b"final_norm", b"finel_norm", 1))
    return ["verify", folder]


def disk_is_full(*arguments: object) -> Arguments:
    def spoil(w: World) -> list[object]:
        w.patch.setattr(files, "free_bytes", lambda path: 1000)
        return ["quantize", w.talking, w.tmp / "new", *arguments]

    return spoil


def ram_is_full(w: World) -> list[object]:
    w.patch.setattr("lowmoe.library.budgets.available_ram_bytes", lambda: 1000)
    return ["quantize", w.talking, w.tmp / "new"]


def no_network(w: World) -> list[object]:
    # The port of discard, where nobody listens; what HF_ENDPOINT said when the library was read.
    w.patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    return run("acme/tiny-moe")


def home_cannot_be_made(*arguments: object) -> Arguments:
    def spoil(w: World) -> list[object]:
        w.patch.setenv("LOWMOE_HOME", str(w.written("file", "in the way") / "home"))
        return [*arguments]

    return spoil


def unwritable_home(w: World) -> list[object]:
    return home_cannot_be_made(*run(w.talking, "--threads", "1"))(w)


def not_empty(w: World) -> list[object]:
    (w.tmp / "photos").mkdir()
    w.written("photos/cat.jpg", "meow")
    return ["quantize", w.talking, w.tmp / "photos"]


def pickles_only(w: World) -> list[object]:
    folder = copy_of(w.talking, w.tmp / "pickles", without="model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    return run(folder)


def another_model(w: World) -> list[object]:
    return ["eval", "demo", w.written("text", "Once upon a time"), "--against", w.talking]


def locked(w: World) -> list[object]:
    from filelock import FileLock

    lock = FileLock(w.tmp / "new.lock")
    lock.acquire()
    w.patch.setattr("tests.cli.test_bad_input.HELD", lock)  # until the test ends
    return ["quantize", w.talking, w.tmp / "new"]


HELD: object = None


CASES = [
    # what the model is
    Case("unknown alias", lambda w: run("mixtral-9x7b"), 2, "Did you mean mixtral-8x7b"),
    Case("another file", lambda w: run(__file__), 2, r"is a file, but not of GGUF"),
    Case("first the model", lambda w: ["run", "none", "--prompt", ""], 2, "no folder here"),
    Case("no such path", lambda w: run("/no/such/model"), 2, "no folder here"),
    Case("neither file", lambda w: run(w.tmp), 1, r"neither manifest\.json .* nor config\.json"),
    Case(
        "family nobody implemented",
        lambda w: run(w.checkpoint(model_type="deepseek_v9")),
        1,
        "model_type is 'deepseek_v9', but implemented are dbrx, ",
    ),
    Case("no model type", lambda w: run(w.checkpoint(model_type=None)), 1, "model_type is None"),
    Case(
        "wants its own code to run",
        lambda w: run(w.checkpoint(auto_map={"AutoModel": "evil.py"})),
        1,
        "auto_map: it wants code of its own to run",
    ),
    Case(
        "config promises more layers",
        lambda w: run(w.checkpoint(num_hidden_layers=3)),
        1,
        r"\d+ tensors that the model is described to have are missing",
    ),
    Case(
        "config promises fewer layers",
        lambda w: run(w.checkpoint(num_hidden_layers=1)),
        1,
        r"\d+ tensors that a mixtral does not have",
    ),
    Case(
        "shapes contradict the config",
        lambda w: ["quantize", w.checkpoint(vocab_size=2048), w.tmp / "new"],
        1,
        r"is \[\d+, \d+\], but config\.json needs \[2048, \d+\]",
    ),
    Case("pickles only", pickles_only, 1, r"found pytorch_model\.bin, which cannot be read"),
    Case("no network", no_network, 1, "no network: http://127.0.0.1:9"),
    # damaged files
    Case(
        "config is not JSON",
        lambda w: run(w.spoiled(w.talking, "config.json", b'{"a":')),
        1,
        r"config\.json: not JSON",
    ),
    Case(
        "tokenizer is not JSON",
        lambda w: run(w.spoiled(w.talking, "tokenizer.json", b'{"a":')),
        1,
        r"tokenizer\.json \(5 bytes\) cannot be read",
    ),
    Case(
        "recommendations are not JSON",
        lambda w: ["inspect", w.spoiled(w.model, "manifest.json", b"[")],
        1,
        r"manifest\.json: not JSON",
    ),
    Case("header claims too much", claims_more_than_it_holds, 1, r"header claims \d+ bytes, but"),
    Case("weights cut short", cut_short, 1, r"describes \d+ bytes, but the file holds \d+"),
    Case("made by a newer version", made_by_a_newer_version, 1, "99, but .* pip install --upgrade"),
    Case("manifest was edited", edited_manifest, 1, "checksum does not match"),
    Case("experts are gone", experts_file_is_gone, 1, "missing, but the manifest lists it"),
    Case("a bit was flipped", one_bit_flipped, 1, r"layers\.\d\.experts\.\d\.plane0 has hash"),
    Case("a header was damaged", header_bit_flipped, 1, "disagree about final_norm"),
    # text
    Case(
        "no tokenizer to calibrate with",
        lambda w: ["quantize", w.mute, w.tmp / "new"],
        1,
        r"has no tokenizer\.json, .* or give --no-calibration",
    ),
    Case("no tokenizer", lambda w: run(w.muted()), 1, r"this model has no tokenizer\.json"),
    Case(
        "no chat template",
        lambda w: run(w.without_template(), "--chat"),
        1,
        "brings no chat template",
    ),
    Case("empty prompt", lambda w: ["run", w.model, "--prompt", ""], 2, "the prompt is empty"),
    Case("empty stdin", lambda w: ["run", w.model], 2, "the prompt is empty"),
    Case("blank stdin", lambda w: ["run", w.model], 2, "the prompt is empty", stdin=" \n\n"),
    Case(
        "prompt longer than the context",
        lambda w: ["run", w.model, "--prompt", "word " * 50, "--context", "20"],
        2,
        r"the prompt has \d+ tokens, but the context holds 20",
    ),
    Case(
        "calibration text is missing",
        lambda w: ["quantize", w.talking, w.tmp / "new", "--calibration", w.tmp / "none.txt"],
        2,
        r"none\.txt: cannot be read as UTF-8 text",
    ),
    Case(
        "calibration text and no calibration",
        lambda w: ["quantize", w.talking, w.tmp / "new", "--calibration", "a", "--no-calibration"],
        2,
        "calibration is a, but calibrating is switched off",
    ),
    Case(
        "calibration text is empty",
        lambda w: ["quantize", w.talking, w.tmp / "n", "--calibration", w.written("empty", "")],
        2,
        "the calibration text is empty",
    ),
    # memory and disk
    Case("disk too small", disk_is_full(), 1, r"needs \d+ bytes of free disk, but 1000 are free"),
    Case("disk too small for nf4", disk_is_full("--format", "nf4"), 1, "Free [0-9]+ bytes more"),
    Case("too little RAM to quantize", ram_is_full, 1, "about [0-9]+ bytes of RAM, but 1000"),
    Case("budget too small", lambda w: run(w.model, "--ram", "1kB"), 1, r"two of \d+ bytes must"),
    Case("home cannot be made", unwritable_home, 1, "gave Not a directory"),
    Case("doctor without a home", home_cannot_be_made("doctor"), 1, "gave Not a directory"),
    Case("target is in use", locked, 1, "another lowmoe is making or removing it"),
    Case("target is a file", lambda w: to_a_file(w), 1, "gave (Not a directory|File exists)"),
    # options
    Case("bits 3", lambda w: run(w.model, "--bits", "3"), 2, "bits is '3', but must be 2, 4, 6"),
    Case("bits banana", lambda w: run(w.model, "--bits", "banana"), 2, "bits is 'banana'"),
    Case("bits in superscript", lambda w: run(w.model, "--bits", "²"), 2, "bits is '²'"),
    Case("bits a folder lacks", lambda w: run(w.two_bits(), "--bits", "6"), 2, "holds 2 bits"),
    Case("kv", lambda w: run(w.model, "--kv", "fp4"), 2, "kv is 'fp4', but must be one of float32"),
    Case("kv of an nf4 folder", lambda w: run(w.nf4(), "--kv", "int8"), 2, "kv is int8, but only"),
    Case("instruction set", with_isa("mmx"), 2, "LOWMOE_ISA is 'mmx', but this processor runs "),
    Case("instruction set, doctor", with_isa("mmx", "doctor"), 2, "or unset it"),
    Case(
        "profile of torch",
        with_isa("torch", "bench", "--profile", "--json"),
        2,
        "computed by torch. Leave it out",
    ),
    Case("make bits 3", lambda w: ["quantize", w.talking, w.tmp / "n", "--bits", "3"], 2, "is 3"),
    Case("format", lambda w: ["quantize", w.talking, w.tmp / "n", "--format", "q4"], 2, "is 'q4'"),
    Case("threads", lambda w: ["quantize", w.talking, w.tmp / "n", "--threads", "-1"], 2, "is -1"),
    Case("no card", lambda w: run(w.model, "--gpu", "4090"), 2, "gpu is '4090', but no NVIDIA"),
    Case("vram", lambda w: run(w.model, "--vram", "8GiB"), 2, "vram is '8GiB', but no NVIDIA dri"),
    Case("ram", lambda w: run(w.model, "--ram", "much"), 2, "--ram is 'much', but must be a size"),
    Case("temperature", lambda w: run(w.model, "--temperature", "-1"), 2, "--temperature.* is -1"),
    Case("top-p", lambda w: run(w.model, "--top-p", "1.5"), 2, r"--top-p\) is 1\.5"),
    Case("no tokens", lambda w: run(w.model, "--max-new-tokens", "0"), 2, "max-new-tokens.* is 0"),
    Case("context", lambda w: run(w.model, "--context", "999"), 2, f"was made for {CONTEXT}"),
    Case("empty stop", lambda w: run(w.model, "--stop", ""), 2, "--stop.* holds ''"),
    # other commands
    Case("not an empty folder", not_empty, 2, "is not empty and no model folder"),
    Case("model is finished", lambda w: ["quantize", w.talking, w.model], 2, "finished model alr"),
    Case("onto itself", lambda w: ["quantize", w.mute, w.mute], 2, "is the checkpoint itself"),
    Case("nothing to quantize", lambda w: ["quantize", w.tmp / "a", w.tmp / "b"], 2, "no such fol"),
    Case("no text to evaluate", lambda w: ["eval", w.model, w.tmp / "a"], 2, "cannot be read as"),
    Case("window", lambda w: ["eval", w.model, w.written("a", "b"), "--window", "1"], 2, "is 1"),
    Case("text too short", lambda w: ["eval", w.model, w.written("a", "")], 2, "has 0 tokens"),
    Case("another vocabulary", another_model, 1, "320, but demo one of 8192"),
    Case("runs", lambda w: ["bench", w.model, "--runs", "0"], 2, "--runs is 0, but must be"),
    Case("layers", lambda w: ["bench", w.model, "--layers", "2"], 2, "and needs --synthetic"),
    Case(
        "shape", lambda w: ["bench", "mixtral", "--synthetic"], 2, r"no alias and no config\.json"
    ),
    Case("pull what is here", lambda w: ["pull", w.talking], 2, "is on this disk already"),
    Case("inspect the hub", lambda w: ["inspect", "mixtral-8x7b"], 2, "Pull it first: lowmoe pull"),
    Case("verify a checkpoint", lambda w: ["verify", w.talking], 2, "is no model folder"),
    Case("quantize a name", lambda w: ["quantize", "demo", w.tmp / "new"], 2, "lowmoe pull demo"),
    Case(
        "quantize what is made", lambda w: ["quantize", w.model, w.tmp / "new"], 2, "is a finished"
    ),
    Case("rm the demo", lambda w: ["rm", "demo"], 2, "comes with lowmoe and cannot be deleted"),
    Case("rm what is not there", lambda w: ["rm", "none"], 2, "'none' is not among the models"),
]


def to_a_file(w: World) -> list[object]:
    return ["quantize", w.talking, w.written("taken", "by a file")]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_bad_input_is_one_line_and_an_exit_code(
    case: Case, world: World, lowmoe_command: RunCommand
) -> None:
    arguments = case.arguments(world)
    before = contents(world.tmp)

    done = lowmoe_command(*arguments, stdin=case.stdin)

    assert done.out == ""
    assert len(done.err.splitlines()) == 1, done.err
    assert re.match("lowmoe: .*" + case.match, done.err), done.err
    assert done.code == case.code
    assert contents(world.tmp) == before


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder but what was measured of the machine."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != NAME]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["quantize", "a", "b", "--bits", "banana"], "--bits"),
        (["run", "--temperature", "warm"], "--temperature"),
        (["run", "--no-such-option"], "--no-such-option"),
        (["eval", "demo"], "Missing argument 'file'"),
        (["dance"], "dance"),
    ],
    ids=["bits", "temperature", "unknown option", "missing argument", "unknown command"],
)
def test_what_typer_refuses_is_explained_by_typer_with_code_2(
    lowmoe_command: RunCommand, arguments: list[str], complaint: str
) -> None:
    done = lowmoe_command(*arguments)
    assert done.code == 2
    assert complaint in done.err
    assert "Usage: lowmoe" in done.err
    assert "Traceback" not in done.err


def test_ctrl_c_is_exit_code_130_without_a_traceback(
    lowmoe_command: RunCommand, world: World
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    world.patch.setattr("lowmoe.cli.run.load_model", interrupt)
    done = lowmoe_command("run", world.model, "--prompt", "Once")
    assert done.code == 130
    assert "Traceback" not in done.err


def test_a_bug_keeps_its_traceback(lowmoe_command: RunCommand, world: World) -> None:
    def fail(*arguments: object) -> None:
        raise ZeroDivisionError("a bug")

    world.patch.setattr("lowmoe.cli.run.load_model", fail)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        lowmoe_command("run", world.model, "--prompt", "Once")


def test_a_message_of_several_lines_is_shown_as_one(
    lowmoe_command: RunCommand, world: World
) -> None:
    def fail(*arguments: object) -> None:
        raise lowmoe.LowMoeError("one\ntwo")

    world.patch.setattr("lowmoe.cli.run.load_model", fail)
    assert lowmoe_command("run", world.model, "--prompt", "Once").err == "lowmoe: one two\n"


def test_stdin_that_is_no_text_is_said_to_be_none(lowmoe_command: RunCommand, world: World) -> None:
    class Binary:
        def isatty(self) -> bool:
            return False

        def read(self) -> str:
            return b"\xff\xfe".decode()

    command = lowmoe_command
    world.patch.setattr("lowmoe.cli.run.sys", _SysWith(Binary()))
    done = command("run", world.model)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "stdin is not text in utf-8" in done.err


class _SysWith:
    """sys, with another stdin, whatever the command is given."""

    def __init__(self, stdin: object) -> None:
        self.stdin = stdin


def test_the_demos_config_is_not_the_tiny_ones() -> None:
    # "another vocabulary" compares the two.
    assert CONFIG["vocab_size"] == 320
