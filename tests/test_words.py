"""Words that belong to one room and may not be heard in another."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import quant
from lowmoe.families import FAMILIES

REPOSITORY = Path(quant.__file__).parent.parent
SOURCES = sorted(p for house in ("lowmoe", "quant") for p in (REPOSITORY / house).rglob("*.py"))
NAMES = [path.relative_to(REPOSITORY).as_posix() for path in SOURCES]
READ_THE_ENVIRONMENT = {"lowmoe/settings.py"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def calls_and_names(source: str) -> Iterator[str]:
    """Every name and dotted name in a source, with the imports' aliases taken back."""
    tree = ast.parse(source)
    origin = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for name in node.names:
                origin[name.asname or name.name] = f"{node.module}.{name.name}"
                yield f"{node.module}.{name.name}"
        if isinstance(node, ast.Import):
            for name in node.names:
                origin[name.asname or name.name] = name.name
                yield name.name
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            first, *rest = ast.unparse(node).split(".")
            yield ".".join([origin.get(first, first), *rest])


def code_words(source: str) -> str:
    """Everything a source says but for its comments and docstrings, in small letters."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree).lower()


def heard(source: str, *words: str) -> set[str]:
    """Those of the words, names or dotted names, that a source uses, or parts of which it does."""
    names = set(calls_and_names(source))
    return {w for w in words if any(n == w or n.startswith(w + ".") for n in names)}


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


def text_of(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def test_a_familys_name_is_not_heard_outside_the_families(name: str) -> None:
    if not name.startswith("lowmoe/families/"):
        words = code_words(text_of(name))
        assert not {family for family in FAMILIES if family in words}


def test_the_families_are_data_and_compute_nothing(name: str) -> None:
    if name.startswith("lowmoe/families/"):
        assert not heard(text_of(name), "torch", "numpy")


def test_only_the_command_line_prints(name: str) -> None:
    if not name.startswith("lowmoe/cli/"):
        assert not heard(text_of(name), "print", "sys.stdout.write", "sys.stderr.write")


def test_nothing_from_outside_is_ever_run(name: str) -> None:
    forbidden = (
        "eval",
        "exec",
        "compile",
        "pickle",
        "torch.load",
        "marshal",
        "shelve",
        "os.system",
    )
    assert not heard(text_of(name), *forbidden)


def test_the_environment_is_read_in_one_place(name: str) -> None:
    if name not in READ_THE_ENVIRONMENT:
        assert not heard(text_of(name), "os.environ", "os.getenv", "os.putenv")


def test_those_who_may_do(name: str) -> None:
    """An exception that is no longer used is to be taken back."""
    if name in READ_THE_ENVIRONMENT:
        assert heard(text_of(name), "os.environ")


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("import pickle\npickle.loads(x)", "pickle"),
        ("from pickle import load as read\nread(f)", "pickle"),
        ("from torch import load\nload(p)", "torch.load"),
        ("import torch as t\nt.load(p)", "torch.load"),
        ("import os as o\nx = o.environ['HOME']", "os.environ"),
        ("from os import environ", "os.environ"),
        ("def f():\n    import torch.nn", "torch"),
        ("print('x')", "print"),
        ("list(map(eval, xs))", "eval"),
    ],
)
def test_a_forbidden_word_is_heard_in_any_disguise(source: str, word: str) -> None:
    assert heard(source, word) == {word}


@pytest.mark.parametrize(
    ("source", "is_heard"),
    [
        ("'A Bert.'\n# bert\ndef f():\n    'Like bert.'\n    return 1", False),
        ("class C:\n    'bert'", False),
        ("x = 'bert'", True),
        ("def f():\n    'Docs.'\n    raise E(f'no BERT {x}')", True),
        ("is_bert = 1", True),
    ],
)
def test_a_familys_name_may_stand_in_explanations_only(source: str, is_heard: bool) -> None:
    assert ("bert" in code_words(source)) == is_heard


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("model.eval()", "eval"),
        ("x = 'print(1)'", "print"),
        ("import torchish", "torch"),
        ("self.environ = 1", "os.environ"),
    ],
)
def test_an_innocent_word_is_not(source: str, word: str) -> None:
    assert heard(source, word) == set()
