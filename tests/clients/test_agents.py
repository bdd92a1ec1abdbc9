"""Coding agents of others send their long prompts and show what the model makes of them.

The model is the demo's, told that its context is long: its words are nonsense then, and come from
as many tokens as the agents send.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import lowmoe
from benchmarks.server.process import Served, served
from lowmoe.checkpoint.file_names import MANIFEST
from lowmoe.checkpoint.manifest import read_manifest
from tests.clients.driven import ENVIRONMENTS, environment_of, launched

DEMO = Path(lowmoe.__file__).parent / "demo"
CONTEXT = 65_536
AT_MOST_S = 600.0  # 30,000 tokens on a busy core
BIN = ENVIRONMENTS / "agents" / "node_modules" / ".bin"


@dataclass(frozen=True, slots=True, kw_only=True)
class Agent:
    """launch: its name to `lowmoe launch`; arguments: for one turn without a terminal, after the
    command that `launch` says; n_prompt: tokens of its prompt, at least.
    """

    title: str
    launch: str
    package: str
    arguments: tuple[str, ...]
    n_prompt: int


AGENTS = (
    Agent(
        title="Codex",
        launch="codex",
        package="@openai/codex",
        arguments=("exec", "--skip-git-repo-check", "Say hi."),
        n_prompt=5_000,
    ),
    Agent(
        title="opencode",
        launch="opencode",
        package="opencode-ai",
        arguments=("run", "Say hi."),
        n_prompt=5_000,
    ),
    Agent(
        title="Claude Code",
        launch="claude-code",
        package="@anthropic-ai/claude-code",
        arguments=("-p", "Say hi."),
        n_prompt=10_000,
    ),
    Agent(
        title="Continue",
        launch="continue",
        package="@continuedev/cli",
        arguments=("-p", "Say hi."),
        n_prompt=1_000,
    ),
)


def agent_version(agent: Agent) -> str:
    about = ENVIRONMENTS / "agents" / "node_modules" / agent.package / "package.json"
    return str(json.loads(about.read_text())["version"])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("wide") / "demo"
    folder.mkdir()
    for path in DEMO.iterdir():
        if path.is_file() and path.name != MANIFEST:
            (folder / path.name).symlink_to(path)
    manifest = read_manifest(DEMO)
    config = {**manifest.config, "max_position_embeddings": CONTEXT}
    (folder / MANIFEST).write_bytes(replace(manifest, config=config).to_json())
    with served(
        str(folder), "--threads", "1", "--context", str(CONTEXT), "--sequences", "2"
    ) as server:
        yield server


@pytest.mark.clients
@pytest.mark.parametrize("agent", AGENTS, ids=[agent.title for agent in AGENTS])
def test_one_turn(agent: Agent, server: Served, tmp_path: Path) -> None:
    told = launched(agent.launch, server.url, tmp_path / "home")
    (tmp_path / "work").mkdir()
    before = {name: server.metric(f"lowmoe_{name}_total") for name in COUNTED}
    done = subprocess.run(
        [*told["command"], *agent.arguments],
        env={
            **environment_of(told),
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(tmp_path / "home"),
        },
        cwd=tmp_path / "work",
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=AT_MOST_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()
    made = {name: server.metric(f"lowmoe_{name}_total") - n for name, n in before.items()}
    assert made["prompt_tokens"] > agent.n_prompt
    assert made["generation_tokens"] > 0


COUNTED = ("prompt_tokens", "generation_tokens")
