"""What only runs on a card is at least whole: on the day there is one, time is short."""

import importlib
import pkgutil

import pytest

import benchmarks.gpu

MODULES = [module.name for module in pkgutil.iter_modules(benchmarks.gpu.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_a_module_finds_all_that_it_imports(name: str) -> None:
    importlib.import_module(f"benchmarks.gpu.{name}")
