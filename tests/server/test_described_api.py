"""Is the server what its own description at /openapi.json says, whatever is sent?

schemathesis makes requests from the description, many of them not quite as it says.  The campaign
sends 20 000 to a model that answers.
"""

import asyncio
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import APIOperation, Case, GenerationMode
from schemathesis.checks import (
    content_type_conformance,
    negative_data_rejection,
    not_a_server_error,
    status_code_conformance,
)

import lowmoe
from lowmoe.server.app import ServerOptions, create_app
from lowmoe.server.worker import Worker
from tests.server.fake_service import FakeService, reading, saying
from tests.server.serving import serving

HANGS_S = 10.0
CHECKS = [
    content_type_conformance,
    negative_data_rejection,
    not_a_server_error,
    status_code_conformance,
]


def operations() -> list[APIOperation[Any, Any, Any, Any]]:
    """Every method and path of the description."""
    description = create_app(FakeService(), ServerOptions()).openapi()
    found = schemathesis.openapi.from_dict(description).get_all_operations()
    return [result.ok() for result in found]


OPERATIONS = operations()


@pytest.fixture(scope="module")
def faces() -> Iterator[str]:
    """All faces, with an answer that is always the same."""
    with serving(FakeService([[*reading(3, 7), *saying("Hello", " world")]])) as url:
        yield url


@pytest.fixture(scope="module")
def whole_server() -> Iterator[str]:
    """All of it, with a small model of little context, so that no answer is long."""
    model = lowmoe.load(str(Path(lowmoe.__file__).parent / "demo"), context=96, sequences=4)
    worker = Worker(model, name="demo")
    with serving(worker, numbers=worker.numbers) as url:
        yield url
    asyncio.run(worker.close())


def requests_of(operation: APIOperation[Any, Any, Any, Any]) -> st.SearchStrategy[Case]:
    """Some as it is described, some not."""
    right = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
    if not operation.body:
        return right
    return right | operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.label)
def test_nothing_that_is_sent_makes_a_face_fail(
    operation: APIOperation[Any, Any, Any, Any], faces: str
) -> None:
    # Whatever hypothesis thinks of how fast and varied they are.
    @settings(
        max_examples=25,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(requests_of(operation))
    def send(case: Case) -> None:
        began = time.monotonic()
        answer = case.call(base_url=faces, timeout=HANGS_S)
        assert time.monotonic() - began < HANGS_S
        case.validate_response(answer, checks=CHECKS)
        # A stream that has begun cannot take its status back.
        assert "its log says why" not in answer.text
        assert "Traceback" not in answer.text

    send()


@pytest.mark.campaign
def test_nothing_of_20_000_requests_makes_the_server_fail(
    whole_server: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    command = [Path(sys.executable).parent / "schemathesis", "run", f"{whole_server}/openapi.json"]
    checks = ",".join(check.__name__ for check in CHECKS)
    limits = [
        f"--request-timeout={HANGS_S}",
        f"--max-response-time={HANGS_S}",
        "--continue-on-failure",
    ]
    done = subprocess.run(
        [*command, f"--checks={checks}", *limits, "--max-examples=2700", "--seed=9", "--no-color"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,  # it writes down what it found
    )
    assert done.returncode == 0, done.stdout
    found = re.search(r"(\d+) generated", done.stdout)
    assert found is not None
    assert int(found[1]) >= 20_000
    # Nor did a stream that had begun, which cannot take its status back.
    assert not [record for record in caplog.records if record.name == "lowmoe.server"]
