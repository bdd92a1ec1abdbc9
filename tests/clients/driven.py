"""The clients that are driven: what each is, where it is installed, how it is started.

Knows:        drivers, environments, what `lowmoe launch` says of each client.
Ignorant of:  what a client must do.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.server.process import LOWMOE
from tests.clients.make_environments import ENVIRONMENTS

HERE = Path(__file__).parent
DRIVERS = HERE / "drivers"
AT_MOST_S = 180.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """launch: its name to `lowmoe launch`; environment: its folder, None for this interpreter's;
    package: whose version is told.
    """

    title: str
    launch: str
    driver: str
    package: str
    environment: str | None = None

    @property
    def is_node(self) -> bool:
        """Else it is Python's."""
        return self.driver.endswith(".mjs")


CLIENTS = (
    Client(
        title="openai (Python), chat completions",
        launch="openai-python",
        driver="openai_python.py",
        package="openai",
    ),
    Client(
        title="openai (Python), responses",
        launch="openai-python",
        driver="openai_responses.py",
        package="openai",
    ),
    Client(
        title="anthropic (Python)",
        launch="anthropic-python",
        driver="anthropic_python.py",
        package="anthropic",
    ),
    Client(title="llm", launch="llm", driver="llm_command.py", package="llm", environment="llm"),
    Client(
        title="langchain-openai",
        launch="langchain",
        driver="langchain_python.py",
        package="langchain-openai",
        environment="langchain",
    ),
    Client(
        title="pydantic-ai-slim",
        launch="pydantic-ai",
        driver="pydantic_ai_python.py",
        package="pydantic-ai-slim",
        environment="pydantic_ai",
    ),
    Client(
        title="litellm",
        launch="litellm",
        driver="litellm_python.py",
        package="litellm",
        environment="litellm",
    ),
    Client(
        title="openai (npm)",
        launch="openai-node",
        driver="openai_node.mjs",
        package="openai",
        environment="node",
    ),
    Client(
        title="@anthropic-ai/sdk (npm)",
        launch="anthropic-node",
        driver="anthropic_node.mjs",
        package="@anthropic-ai/sdk",
        environment="node",
    ),
    Client(
        title="ai, @ai-sdk/openai-compatible (npm)",
        launch="ai-sdk",
        driver="ai_sdk.mjs",
        package="ai",
        environment="node",
    ),
)


def launched(name: str, url: str, home: Path) -> Mapping[str, Any]:
    """What `lowmoe launch` says, its files written."""
    done = subprocess.run(
        [*LOWMOE, "launch", name, "--url", url, "--json"],
        env={**os.environ, "LOWMOE_HOME": str(home)},
        capture_output=True,
        check=True,
    )
    told: Mapping[str, Any] = json.loads(done.stdout.splitlines()[-1])
    for path, text in told["files"].items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text)
    return told


def environment_of(told: Mapping[str, Any]) -> dict[str, str]:
    """A client's, with what `launch` says and without what it leaves out."""
    own = {name: value for name, value in os.environ.items() if name not in told["unset"]}
    return {**own, **told["environment"]}


def drive(client: Client, url: str, home: Path) -> dict[str, Mapping[str, Any]]:
    """What became of every behaviour."""
    told = launched(client.launch, url, home)
    environment = {**environment_of(told), "DRIVEN_MODEL": "demo"}
    done = subprocess.run(
        _command(client, told), env=environment, capture_output=True, text=True, timeout=AT_MOST_S
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"behaviour"')]
    assert lines, done.stdout + done.stderr
    return {found["behaviour"]: found for found in map(json.loads, lines)}


def _command(client: Client, told: Mapping[str, Any]) -> list[str]:
    if not client.is_node:
        return [str(python_of(client)), str(DRIVERS / client.driver)]
    folder = ENVIRONMENTS / "node"  # whose packages only files beside them may import
    for file in (*DRIVERS.glob("*.mjs"), DRIVERS / "questions.json"):
        shutil.copy(file, folder)
    (folder / "snippet.mjs").write_text(told["snippet"] or "")
    node = shutil.which("node")
    assert node is not None
    return [node, str(folder / client.driver)]


def python_of(client: Client) -> Path:
    """The interpreter that has it."""
    if client.environment is None:
        return Path(sys.executable)
    return ENVIRONMENTS / client.environment / "bin" / "python"


def is_installed(client: Client) -> bool:
    """Whether make_environments.py was run."""
    if client.is_node:
        return (ENVIRONMENTS / "node" / "node_modules" / client.package).is_dir()
    return python_of(client).exists()


def version_of(client: Client) -> str:
    """Of its package."""
    if client.is_node:
        about = ENVIRONMENTS / "node" / "node_modules" / client.package / "package.json"
        return str(json.loads(about.read_text())["version"])
    say = f"import importlib.metadata as m; print(m.version({client.package!r}))"
    done = subprocess.run(
        [python_of(client), "-c", say], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()
