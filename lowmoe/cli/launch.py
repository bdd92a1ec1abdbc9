"""`lowmoe launch`: other people's programs, pointed at a server.

Knows:        what a server says of itself, which variables would lead a program to somebody else's.
Ignorant of:  how each program is configured.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from lowmoe.cli.launch_clients import CLIENTS, Launch, Server
from lowmoe.cli.render import print_json
from lowmoe.errors import FolderError, UsageError
from lowmoe.settings import inherited, read_settings

ANSWER_S = 10.0
UNKNOWN_CONTEXT = 32_768  # tokens, where a model's name is given and its server not asked

# Of programs and libraries that would rather talk to a cloud, and be paid for: whatever of these is
# set, and is not set for the program, is left out of what it sees.
_CLOUD = re.compile(
    r"(OPENAI|ANTHROPIC|AZURE_OPENAI|GEMINI|OPENROUTER|LITELLM)_.*|CLAUDE_CODE_USE_.*"
    r"|AWS_BEARER_TOKEN_BEDROCK|.*_API_KEY"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """model: None to ask the server; api_key: None for the environment's; command: in place of the
    program's own.
    """

    client: str | None
    url: str
    model: str | None
    api_key: str | None
    command: tuple[str, ...]
    dry_run: bool
    json: bool


def launch_command(asked: Asked) -> int:
    """Print what to do, or do it and give the program's exit status."""
    client = asked.client
    if client is None or client not in CLIENTS:
        found = "no client was named" if client is None else f"client {client!r} is unknown"
        raise UsageError(f"{found}. Known are {', '.join(sorted(CLIENTS))}.")
    settings = read_settings()
    key = settings.api_key if asked.api_key is None else asked.api_key
    server = _server(asked.url.rstrip("/").removesuffix("/v1"), asked.model, key)
    launch = CLIENTS[client](server, settings.home / "launch" / client)
    command = asked.command or launch.command
    cleared = cloud_variables(inherited(), launch.environment)
    if asked.json:
        print_json(_as_object(launch, command, cleared))
    elif asked.dry_run:
        sys.stdout.write(_as_script(launch, command, cleared, server))
    else:
        return _start(client, launch, command, cleared)
    return 0


def cloud_variables(environment: Collection[str], own: Collection[str]) -> list[str]:
    """Names that are not passed on."""
    return sorted(name for name in environment if _CLOUD.fullmatch(name) and name not in own)


def _server(url: str, model: str | None, key: str | None) -> Server:
    if not re.fullmatch(r"https?://[^/\s]+", url):
        raise UsageError(f"--url is {url!r}, but must be like http://127.0.0.1:8080.")
    if model is not None:
        if not model.isprintable():
            raise UsageError(f"--model is {model!r}, but a name is printable, on one line.")
        return Server(url=url, model=model, n_context=UNKNOWN_CONTEXT, key=key)
    request = urllib.request.Request(f"{url}/v1/models")
    if key is not None:
        request.add_header("Authorization", f"Bearer {key}")
    # A proxy of this machine's environment knows nothing of what runs on it.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=ANSWER_S) as answer:
            found = json.load(answer)["data"][0]
        name, n_context = found["id"], found["max_model_len"]
        # They get into scripts and configurations, and not every server is one's own.
        if not isinstance(name, str) or not name.isprintable() or type(n_context) is not int:
            raise ValueError(f"a model is called {name!r} and holds {n_context!r} tokens")
        return Server(url=url, model=name, n_context=n_context, key=key)
    except urllib.error.HTTPError as error:
        words = "wants another --api-key" if error.code in (401, 403) else f"says {error}"
        raise UsageError(f"the server at {url} {words}.") from error
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UsageError(
            f"no lowmoe answers at {url} ({error}). Start `lowmoe serve`, or give its --url, or "
            "--model where it need not be asked."
        ) from error


def _as_object(
    launch: Launch, command: tuple[str, ...] | None, cleared: list[str]
) -> Mapping[str, object]:
    return {
        "environment": dict(launch.environment),
        "unset": cleared,
        "files": {str(path): text for path, text in launch.files.items()},
        "command": command,
        "snippet": launch.snippet,
        "place": launch.place,
        "install": launch.install,
    }


def _as_script(
    launch: Launch, command: tuple[str, ...] | None, cleared: list[str], server: Server
) -> str:
    """For a shell, what belongs elsewhere in comments."""
    lines = [f"# {launch.title} at {server.url}, model {server.model}"]
    for path, text in launch.files.items():
        lines.append(f"mkdir -p {shlex.quote(str(path.parent))}")
        lines += [f"cat > {shlex.quote(str(path))} <<'END'", text.rstrip("\n"), "END"]
    lines += [f"unset {name}" for name in cleared]
    lines += [f"export {name}={shlex.quote(v)}" for name, v in launch.environment.items()]
    if launch.snippet is not None:
        lines.append(f"# Into {launch.place}:")
        lines += [f"#   {line}" for line in launch.snippet.splitlines()]
    if command is not None:
        lines.append(shlex.join(command))
    return "\n".join(lines) + "\n"


def _start(client: str, launch: Launch, command: tuple[str, ...] | None, cleared: list[str]) -> int:
    if command is None:
        raise UsageError(
            f"{launch.title} is not started from here. Give a command of yours after --, or "
            f"see `lowmoe launch {client} --dry-run`."
        )
    program = shutil.which(command[0])
    if program is None:
        raise UsageError(
            f"{command[0]} is not installed here, or not on the PATH. Get it: {launch.install}"
        )
    for path, text in launch.files.items():
        _write_private(path, text)
    environment = {name: v for name, v in inherited().items() if name not in cleared}
    done = subprocess.run([program, *command[1:]], env={**environment, **launch.environment})
    return done.returncode


def _write_private(path: Path, text: str) -> None:
    """For nobody else to read: a key may be in it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
        path.write_text(text, encoding="utf-8")
    except OSError as e:
        raise FolderError(
            f"{path}: writing it gave {e.strerror}. Set LOWMOE_HOME to a folder that can be "
            "written to."
        ) from e
