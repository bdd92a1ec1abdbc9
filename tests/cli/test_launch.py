"""`lowmoe launch` says and does the same, and leads no program to anybody's cloud."""

import http.server
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from lowmoe.cli.launch import cloud_variables
from lowmoe.cli.launch_clients import CLIENTS, Server
from tests.cli.conftest import RunCommand

SERVER = Server(url="http://127.0.0.1:9", model="de'mo", n_context=512, key="a $key 'x'")
GIVEN = ("--url", SERVER.url, "--model", SERVER.model, "--api-key", SERVER.key)
SHOW = "import json, os, sys; json.dump(dict(os.environ), open(sys.argv[1], 'w'))"


def said(lowmoe_command: RunCommand, *arguments: object) -> dict[str, Any]:
    done = lowmoe_command("launch", *arguments, *GIVEN, "--json")
    assert done.code == 0
    found: dict[str, Any] = json.loads(done.out.splitlines()[-1])
    return found


@pytest.mark.parametrize("client", CLIENTS)
def test_every_client_is_told_the_address_and_the_key(
    home: Path, lowmoe_command: RunCommand, client: str
) -> None:
    found = said(lowmoe_command, client)
    everything = json.dumps([found["environment"], found["files"], found["snippet"]])
    assert SERVER.url in everything
    assert json.dumps(json.dumps(SERVER.key))[1:-1].strip('\\"') in everything
    assert found["files"] or found["environment"] or found["snippet"]
    assert all(Path(path).is_relative_to(home) for path in found["files"])
    assert not home.exists()  # nothing was written


@pytest.mark.parametrize("client", CLIENTS)
def test_a_shell_that_follows_a_dry_run_does_what_a_launch_does(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lowmoe_command: RunCommand,
    client: str,
) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "somebody")
    monkeypatch.setenv("MISTRAL_API_KEY", "somebody's")
    command = (sys.executable, "-c", SHOW)
    seen, files = [], []
    for i, how in enumerate([("--dry-run",), ()]):
        told = tmp_path / str(i)
        done = lowmoe_command("launch", client, *GIVEN, *how, "--", *command, told)
        assert done.code == 0
        if how:
            subprocess.run(["sh", "-eu"], input=done.out.encode(), check=True)
        seen.append({k: v for k, v in json.loads(told.read_text()).items() if k not in _SHELL})
        written = sorted(path for path in home.rglob("*") if path.is_file())
        files.append({path: path.read_text() for path in written})
        for path in written:
            path.unlink()
    assert seen[0] == seen[1]
    assert files[0] == files[1]
    assert not {"OPENAI_ORG_ID", "MISTRAL_API_KEY"} & seen[0].keys()


def test_a_home_that_cannot_be_written_to_is_said_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lowmoe_command: RunCommand
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LOWMOE_HOME", str(tmp_path / "file"))
    done = lowmoe_command("launch", "llm", *GIVEN, "--", "true")
    assert done.code == 1
    (line,) = done.err.splitlines()
    assert "Set LOWMOE_HOME to a folder that can be written to" in line


# What a shell sets by itself.
_SHELL = {"_", "COLUMNS", "LINES", "OLDPWD", "PWD", "SHLVL"}


@pytest.mark.parametrize("client", CLIENTS)
def test_files_are_in_the_form_that_their_names_say(tmp_path: Path, client: str) -> None:
    for path, text in CLIENTS[client](SERVER, tmp_path).files.items():
        if path.suffix == ".toml":
            tomllib = pytest.importorskip("tomllib")  # of Python 3.11
            assert tomllib.loads(text)["model_providers"]["lowmoe"]["base_url"] == SERVER.v1
        else:  # JSON is YAML too
            assert json.loads(text)


def test_a_file_with_a_key_is_nobody_elses_to_read(home: Path, lowmoe_command: RunCommand) -> None:
    lowmoe_command("launch", "opencode", *GIVEN, "--", sys.executable, "-c", "")
    (path,) = (path for path in home.rglob("*") if path.is_file())
    assert path.stat().st_mode & 0o077 == 0


def test_what_leads_to_a_cloud_is_not_passed_on() -> None:
    names = ["OPENAI_API_KEY", "CLAUDE_CODE_USE_BEDROCK", "GROQ_API_KEY", "HOME", "HF_TOKEN"]
    assert cloud_variables(names, own=()) == sorted(names[:3])
    assert cloud_variables(names, own=("OPENAI_API_KEY",)) == sorted(names[1:3])


def test_the_programs_exit_status_is_ours(home: Path, lowmoe_command: RunCommand) -> None:
    command = (sys.executable, "-c", "raise SystemExit(7)")
    assert lowmoe_command("launch", "openai-python", *GIVEN, "--", *command).code == 7


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "no client was named. Known are ai-sdk, aider"),
        (("nobody",), "client 'nobody' is unknown. Known are"),
        (("openai-python",), "is not started from here. Give a command of yours after --"),
        (("aider", "--", "no-such-program"), "no-such-program is not installed here"),
        (("aider", "--url", "ftp://x"), "--url is 'ftp://x', but must be like"),
        (
            ("codex", "--model", "a\ntouch b", "--dry-run"),
            "--model is 'a\\ntouch b', but a name is",
        ),
    ],
)
def test_what_cannot_be_launched_is_said_in_a_line(
    lowmoe_command: RunCommand, arguments: tuple[str, ...], complaint: str
) -> None:
    given = () if "--url" in arguments else GIVEN
    done = lowmoe_command("launch", *given, *arguments)
    assert done.code == 2
    (line,) = done.err.splitlines()
    assert complaint in line


def test_a_server_that_is_not_there_is_said_in_a_line(lowmoe_command: RunCommand) -> None:
    done = lowmoe_command("launch", "codex", "--url", "http://127.0.0.1:9", "--dry-run")
    assert done.code == 2
    (line,) = done.err.splitlines()
    assert "no lowmoe answers at http://127.0.0.1:9" in line


@pytest.mark.parametrize(
    ("name", "n_context"),
    [("a\ntouch /tmp/b\n", 512), ("a", '512\nnotify = ["sh"]'), ("a", None), (["a"], 512)],
)
def test_what_a_server_says_of_itself_becomes_no_command(
    lowmoe_command: RunCommand, name: Any, n_context: Any
) -> None:
    body = json.dumps({"data": [{"id": name, "max_model_len": n_context}]}).encode()

    class Hostile(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Hostile) as server:
        answering = threading.Thread(target=server.handle_request)
        answering.start()
        url = f"http://127.0.0.1:{server.server_port}"
        done = lowmoe_command("launch", "codex", "--url", url, "--dry-run")
        answering.join()
    assert done.code == 2
    assert done.out == ""
    (line,) = done.err.splitlines()
    assert f"no lowmoe answers at {url} (a model is called" in line
