"""A model hub on the loopback, which can be told to misbehave.

Knows:        the answers huggingface_hub asks a hub for, Range, redirects to a storage server.
Ignorant of:  lowmoe; what it claims is checked by huggingface_hub's own downloader in test_hub.py.

As on the real hub, files in large-file storage are answered with a redirect to another server, on
another port here, and the rest directly.
"""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What goes wrong with one request; faults of a path are used up one by one."""

    status: int | None = None  # answered instead of the file
    headers: tuple[tuple[str, str], ...] = ()  # beside the usual ones
    body: bytes | None = None  # sent instead of the content, with its own length
    cut_after: int | None = None  # bytes of the body, then the connection ends
    without_range: bool = False  # answers 200 and the whole file, whatever was asked
    from_byte: int | None = None  # answers 206 from here, whatever was asked
    unannounced: bool = False  # no Content-Length: the body ends with the connection
    then_gone: bool = False  # no connection is accepted afterwards
    from_storage: bool = False  # the storage server misbehaves, not the hub itself


GATED = Fault(status=403, headers=(("X-Error-Code", "GatedRepo"),))
NO_REPOSITORY = Fault(status=401, headers=(("X-Error-Code", "RepoNotFound"),))


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request as the server saw it, and how much of a body it sent back."""

    server: str  # "hub" or "storage"
    method: str
    path: str
    headers: dict[str, str]
    status: int
    bytes_sent: int

    @property
    def file(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    @property
    def first_byte(self) -> int:
        return int(self.headers.get("range", "bytes=0-").removeprefix("bytes=").rstrip("-"))


@dataclass(kw_only=True)
class FakeHub:
    """Serves the files of one repository, a set of files per commit; use it with `with`."""

    repo_id: str = "acme/tiny-moe"
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    faults: dict[str, list[Fault]] = field(default_factory=dict)  # by file name, or "api"
    siblings: list[object] | None = None  # listed instead of the true ones
    requests: list[Request] = field(default_factory=list)

    def __enter__(self) -> FakeHub:
        self._lock = threading.Lock()
        self.is_gone = False
        self._servers = [_Server(self, role) for role in ("hub", "storage")]
        self._threads = [
            # The poll interval bounds how long the end of a test waits.
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
            for server in self._servers
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.go_away()
        for thread in self._threads:
            thread.join()

    def go_away(self) -> None:
        """Accept no further connection, and answer nothing on those that are open."""
        self.is_gone = True
        for server in self._servers:
            server.shutdown()
            server.server_close()

    @property
    def endpoint(self) -> str:
        return self._servers[0].address

    @property
    def storage(self) -> str:
        return self._servers[1].address

    def add_commit(self, files: dict[str, bytes], *, branch: str = "main") -> str:
        """Put a branch on a new commit that holds these files; returns its id."""
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[commit] = files
        self.branches[branch] = commit
        return commit

    def downloads(self, name: str) -> list[Request]:
        """The requests that were answered with some of a file's bytes, in order."""
        return [r for r in self.requests if r.method == "GET" and r.file == name and r.bytes_sent]

    def describe(self, commit: str) -> bytes:
        siblings = [_sibling(*item) for item in self.commits[commit].items()]
        return json.dumps(
            {
                "id": self.repo_id,
                "sha": commit,
                "siblings": siblings if self.siblings is None else self.siblings,
            }
        ).encode()

    def next_fault(self, key: str, *, storage: bool) -> Fault:
        with self._lock:
            waiting = self.faults.get(key, [])
            if waiting and waiting[0].from_storage == storage:
                return waiting.pop(0)
        return Fault()


def in_large_file_storage(name: str) -> bool:
    return name.endswith((".safetensors", "tokenizer.json", ".bin", ".gguf"))


def git_blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _sibling(name: str, content: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"rfilename": name, "size": len(content)}
    if not in_large_file_storage(name):
        return entry | {"blobId": git_blob_id(content)}
    lfs = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry | {"blobId": git_blob_id(b"the pointer"), "lfs": lfs}


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: FakeHub, role: str) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.hub = hub
        self.role = role

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is part of the tests."""


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        if self.server.hub.is_gone:
            self.close_connection = True
        elif self.server.role == "storage":
            commit, name = path.split("/", 1)
            self._send_file(self.server.hub.commits[commit][name], self._fault(name))
        elif path.startswith(f"api/models/{self.server.hub.repo_id}"):
            self._answer_api(path)
        elif path.startswith(f"{self.server.hub.repo_id}/resolve/"):
            place = path.removeprefix(f"{self.server.hub.repo_id}/resolve/")
            self._answer_resolve(*place.split("/", 1))
        else:
            self._send(404, (("X-Error-Code", "RepoNotFound"),), b"")

    def _fault(self, key: str) -> Fault:
        return self.server.hub.next_fault(key, storage=self.server.role == "storage")

    def _answer_api(self, path: str) -> None:
        fault = self._fault("api")
        revision = path.partition("/revision/")[2] or "main"
        commit = self.server.hub.branches.get(revision, revision)
        if fault.status is not None:
            self._send(fault.status, fault.headers, fault.body or b"")
        elif fault.body is not None:
            self._send(200, fault.headers, fault.body)
        elif commit not in self.server.hub.commits:
            self._send(404, (("X-Error-Code", "RevisionNotFound"),), b"")
        else:
            self._send(200, (), self.server.hub.describe(commit))

    def _answer_resolve(self, revision: str, name: str) -> None:
        commit = self.server.hub.branches.get(revision, revision)
        content = self.server.hub.commits[commit].get(name)
        fault = self._fault(name)
        if fault.status is not None:
            self._send(fault.status, fault.headers, b"")
        elif content is None:
            self._send(404, (("X-Error-Code", "EntryNotFound"),), b"")
        elif in_large_file_storage(name) and fault == Fault():
            self._redirect(commit, name, content)
        else:
            etag = ("ETag", f'"{git_blob_id(content)}"')
            self._send_file(content, fault, (("X-Repo-Commit", commit), etag))

    def _redirect(self, commit: str, name: str, content: bytes) -> None:
        headers = (
            ("Location", f"{self.server.hub.storage}/{commit}/{name}"),
            ("X-Repo-Commit", commit),
            ("X-Linked-Size", str(len(content))),
            ("X-Linked-Etag", f'"{hashlib.sha256(content).hexdigest()}"'),
        )
        self._send(302, headers, b"")

    def _send_file(
        self, content: bytes, fault: Fault, headers: tuple[tuple[str, str], ...] = ()
    ) -> None:
        if fault.status is not None:
            self._send(fault.status, fault.headers, b"")
            return
        content = content if fault.body is None else fault.body
        asked = self.headers.get("Range")
        if asked is None or fault.without_range:
            self._send(200, headers, content, fault)
            return
        start = int(asked.removeprefix("bytes=").rstrip("-"))
        start = start if fault.from_byte is None else fault.from_byte
        if start >= len(content):
            self._send(416, (("Content-Range", f"bytes */{len(content)}"),), b"")
            return
        span = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(206, (*headers, ("Content-Range", span)), content[start:], fault)

    def _send(
        self,
        status: int,
        headers: tuple[tuple[str, str], ...],
        body: bytes,
        fault: Fault | None = None,
    ) -> None:
        fault = fault or Fault()
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        if fault.unannounced:
            self.close_connection = True
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        sent = body if fault.cut_after is None else body[: fault.cut_after]
        sent = sent if self.command == "GET" else b""
        if fault.then_gone:
            self.server.hub.go_away()
        # Recorded first, so that who has the last byte also finds the record.
        self._record(status, len(sent))
        self.wfile.write(sent)
        if fault.cut_after is not None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_WR)

    def _record(self, status: int, bytes_sent: int) -> None:
        request = Request(
            server=self.server.role,
            method=self.command,
            path=self.path,
            headers={name.lower(): value for name, value in self.headers.items()},
            status=status,
            bytes_sent=bytes_sent,
        )
        self.server.hub.requests.append(request)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: what was asked is in `FakeHub.requests`."""


def tiny_checkpoint(shard_bytes: int = 300_000) -> dict[str, bytes]:
    """The files of a repository with two shards and what usually lies beside them."""
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    index = {"weight_map": {f"layer.{n}": name for n, name in enumerate(names)}}
    # Any bytes do: nothing here looks into a shard. The hash spreads, so no two parts are equal.
    shards = {name: _noise(name, shard_bytes) for name in names}
    return {
        ".gitattributes": b"*.safetensors filter=lfs\n",
        "README.md": b"# tiny\n",
        "config.json": b'{"model_type": "tiny"}',
        "modeling_tiny.py": b"raise SystemExit\n",
        "model.safetensors.index.json": json.dumps(index).encode(),
        "tokenizer.json": b'{"version": "1.0"}',
        **shards,
    }


def _noise(seed: str, n_bytes: int) -> bytes:
    return hashlib.shake_128(seed.encode()).digest(n_bytes)
