"""Drives the command llm."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import harness
from harness import GIRL, LONG, N_TOKENS, SCHEMA, SEA, TOO_LONG

LLM = str(Path(sys.executable).with_name("llm"))
EXACT = ("-o", "temperature", "0", "-o", "max_tokens", str(N_TOKENS))


def run(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([LLM, *arguments], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done


def chat(text: str = GIRL) -> dict[str, Any]:
    done = run(text, *EXACT, "--no-stream", "--usage")
    n_new = done.stderr.split("output")[0].split(",")[-1].strip()
    return {"text": done.stdout.removesuffix("\n"), "finish": None, "n_new": int(n_new)}


def stream() -> dict[str, Any]:
    with subprocess.Popen([LLM, GIRL, *EXACT], stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        pieces = []
        while piece := running.stdout.read1(4096):  # type: ignore[attr-defined]
            pieces.append(piece)
    text = b"".join(pieces).decode().removesuffix("\n")
    return {"pieces": [text[:1], text[1:]] if len(pieces) > 1 else [text], "n_new": None}


def cancel() -> dict[str, Any]:
    with subprocess.Popen(
        [LLM, LONG], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as running:
        assert running.stdout is not None
        first = running.stdout.read1(4096).decode()  # type: ignore[attr-defined]
        running.send_signal(signal.SIGINT)
    return {"first": first}


def tools() -> None:
    raise harness.Absent("cannot ask that a tool be called")


def schema() -> str:
    return run(GIRL, "--schema", json.dumps(SCHEMA)).stdout


def error() -> dict[str, Any]:
    return {"status": 400, "message": run(TOO_LONG, "--no-stream", code=1).stderr}


def two() -> list[str]:
    both = [
        subprocess.Popen([LLM, text, *EXACT], stdout=subprocess.PIPE, text=True)
        for text in (GIRL, SEA)
    ]
    return [one.communicate()[0].removesuffix("\n") for one in both]


def models() -> list[str]:
    listed = run("models").stdout.splitlines()
    return [line.rpartition(": ")[2] for line in listed]


if __name__ == "__main__":
    harness.drive(
        {
            "models": models,
            "chat": chat,
            "other": lambda: chat(SEA),
            "stream": stream,
            "cancel": cancel,
            "tools": tools,
            "schema": schema,
            "error": error,
            "two": two,
        }
    )
