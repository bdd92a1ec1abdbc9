"""`lowmoe serve` as a process, and what is seen of it from outside: its answers, metrics, memory.

Knows:        how it is started and ended, a stream of /v1/completions as bytes on a socket.
Ignorant of:  what is asked, what would be good.
"""

import asyncio
import contextlib
import json
import re
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

LOWMOE = [sys.executable, "-c", "from lowmoe.cli.app import main; main()"]
_ADDRESS = re.compile(r"answers at (http://[\d.]+:\d+)")
END_S = 60.0
MOST_BYTES = 1 << 20  # of a line


@dataclass(frozen=True, slots=True)
class Served:
    """A server that answers."""

    url: str
    process: subprocess.Popen[str]

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        parts = urlsplit(self.url)
        return str(parts.hostname), int(parts.port or 0)

    def metric(self, name: str) -> float:
        """The value of one of /metrics, its labels in its name."""
        with urllib.request.urlopen(f"{self.url}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        (found,) = (line for line in lines if line.startswith(f"{name} "))
        return float(found.split()[1])

    def own_bytes(self) -> int:
        """Memory that only this process has: files' pages left out, what was swapped counted."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return sum(
            int(kib) * 1024 for kib in re.findall(r"^(?:RssAnon|VmSwap):\s+(\d+)", status, re.M)
        )

    def n_files(self) -> int:
        """Descriptors that are open."""
        return psutil.Process(self.process.pid).num_fds()


@contextlib.contextmanager
def served(model: str, *options: str) -> Iterator[Served]:
    """It ends as it does for Ctrl-C, and well, unless it has ended before."""
    command = [*LOWMOE, "serve", model, "--port", "0", "--gpu", "none", *options]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdout is not None
        found = next(filter(None, map(_ADDRESS.search, process.stdout)), None)
        if found is None:
            errors.seek(0)
            raise RuntimeError(f"it did not start: {errors.read()}")
        try:
            yield Served(found[1], process)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                assert process.wait(END_S) in (0, 130)


def request(body: dict[str, Any], path: str = "/v1/completions") -> bytes:
    """As sent over a connection of its own."""
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + data


async def frames(server: Served, body: dict[str, Any]) -> AsyncIterator[str]:
    """The data of each frame of a stream, pings left out; first "" as the headers are here.

    Raises RuntimeError for another status than 200, ConnectionError for a stream that breaks off.
    """
    reader, writer = await asyncio.open_connection(*server.address, limit=MOST_BYTES)
    try:
        writer.write(request({**body, "stream": True}))
        head = (await _until(reader, b"\r\n\r\n")).decode()
        if " 200 " not in head.splitlines()[0]:
            raise RuntimeError(head + (await reader.read()).decode())
        yield ""
        rest = b""
        while n_bytes := int(await _until(reader, b"\r\n"), 16):
            rest += (await reader.readexactly(n_bytes + 2))[:-2]
            *whole, rest = rest.split(b"\n\n")
            for frame in whole:
                if frame.startswith(b"data: "):
                    yield frame[len(b"data: ") :].decode()
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def _until(reader: asyncio.StreamReader, end: bytes) -> bytes:
    try:
        return await reader.readuntil(end)
    except asyncio.IncompleteReadError as broken:
        raise ConnectionError("the stream broke off") from broken


async def text_of(server: Served, body: dict[str, Any]) -> str:
    """A whole stream's.  Raises RuntimeError for an error in it, or an end without its mark."""
    said, last = "", ""
    async for frame in frames(server, body):
        if frame.startswith("{"):
            told = json.loads(frame)
            if "error" in told:
                raise RuntimeError(frame)
            said += "".join(choice["text"] for choice in told["choices"])
        last = frame
    if last != "[DONE]":
        raise RuntimeError(f"the stream ended with {last!r}")
    return said
