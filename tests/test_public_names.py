"""The public surface is what `__all__` says, no more and no less."""

import importlib.metadata
import re

import pytest

import lowmoe


def test_the_public_names_are_sorted_and_each_comes_once() -> None:
    assert lowmoe.__all__ == sorted(set(lowmoe.__all__))


@pytest.mark.parametrize("name", [n for n in lowmoe.__all__ if n != "__version__"])
def test_every_public_name_can_be_imported_and_says_what_it_is(name: str) -> None:
    thing = getattr(lowmoe, name)

    assert thing.__name__ == name
    assert thing.__doc__


def test_every_error_a_user_may_catch_is_a_lowmoe_error() -> None:
    from lowmoe import errors

    found = [e for e in vars(errors).values() if isinstance(e, type)]
    assert len(found) > 5
    assert all(issubclass(error, lowmoe.LowMoeError) for error in found)


def test_the_version_is_that_of_the_installed_package() -> None:
    try:
        installed = importlib.metadata.version("lowmoe")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("lowmoe is not installed here")
    assert lowmoe.__version__ == installed
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", installed)


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'laod'"):
        lowmoe.laod  # noqa: B018
