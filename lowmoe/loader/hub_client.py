"""Asks a hub for a repository's file list and for the bytes of a file, however often it takes.

Knows:        huggingface_hub and what it raises, which faults another try may not meet again.
Ignorant of:  which files are wanted, hashes, what the work folder remembers.

The bytes come by the library's `http_get`, the loop inside `hf_hub_download` and `HfFileSystem`: it
asks for ranges, redirects, goes on after a cut, waits when it is asked to. `hf_hub_download` itself
deletes an unfinished file when it gives up and never looks for one of a killed process (pull
request 4228 of huggingface_hub): each such fault would cost a home user gigabytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lowmoe.errors import DownloadError, UnknownModelError
from lowmoe.loader.hub_record import GO_ON, HubFile

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.hf_api import ModelInfo

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often a fault that outlived the library's own tries is met with another, and when.

    The count starts anew whenever a file has grown. With these defaults a silent line is given up
    after 1 + 2 + 4 + ... + 60 = 123 s: a home router restarts in about two minutes.
    """

    tries: int = 8
    first_wait_s: float = 1.0
    longest_wait_s: float = 60.0
    sleep: Callable[[float], None] = time.sleep


class HubClient:
    """The two questions asked: what does the repository hold, and the bytes of a file."""

    def __init__(self, repo_id: str, *, endpoint: str | None, retry: RetryPolicy) -> None:
        from huggingface_hub import __version__, constants

        self.repo_id = repo_id
        self._endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        # In place of the library's own, which names every framework that is installed.
        self._headers = {"user-agent": f"lowmoe; hf_hub/{__version__}"}
        self._retry = retry

    def describe(self) -> ModelInfo:
        """The main branch's commit and file list. No network at all is not waited for."""
        from huggingface_hub import HfApi, constants
        from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

        api = HfApi(endpoint=self._endpoint, headers=self._headers)
        timeout_s = constants.HF_HUB_DOWNLOAD_TIMEOUT

        def ask() -> ModelInfo:
            try:
                return api.model_info(self.repo_id, files_metadata=True, timeout=timeout_s)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                raise DownloadError(f"no network: {self._endpoint} gave {error}.") from None
            except (KeyError, TypeError, AttributeError) as error:
                # What the library lets through when the answer is JSON, but describes no model.
                raise ValueError(f"{type(error).__name__}: {error}") from None

        return self._outlive_faults(ask, f"{self.repo_id}: no file list", lambda: 0)

    def require_short_enough(self, files: Iterable[HubFile]) -> None:
        """Raises DownloadError for a file that is longer than the library fetches."""
        from huggingface_hub import constants

        for file in files:
            if file.bytes > constants.MAX_HTTP_DOWNLOAD_SIZE:
                raise DownloadError(
                    f"{file.name} has {file.bytes:,} bytes, the hub hands out files of at most "
                    f"{constants.MAX_HTTP_DOWNLOAD_SIZE:,}. Name a repository with smaller shards."
                )

    def fetch_rest(
        self, part: Path, file: HubFile, *, commit: str, on_bytes: Callable[[int], None]
    ) -> None:
        """Append to part until it is as long as the file. The disk's own OSErrors are passed on."""
        self._outlive_faults(
            lambda: self._append_rest(part, file, commit, on_bytes),
            f"{file.name}: not all of its {file.bytes:,} bytes came",
            lambda: part.stat().st_size,
        )

    def _append_rest(
        self, part: Path, file: HubFile, commit: str, on_bytes: Callable[[int], None]
    ) -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        # Compressed on the way, what is here and what a range counts would differ.
        headers = build_hf_headers(headers=self._headers | {"accept-encoding": "identity"})
        url = hf_hub_url(self.repo_id, file.path, revision=commit, endpoint=self._endpoint)
        try:
            with part.open("ab") as handle:
                http_get(
                    url,
                    handle,
                    resume_size=handle.tell(),
                    headers=headers,
                    expected_size=file.bytes,
                    displayed_filename=file.name,
                    tqdm_class=_bar_class(file, on_bytes),
                )
        except OSError as error:
            if _lengths_disagree(error):
                part.write_bytes(b"")  # it may be no beginning of the file
            raise

    def _outlive_faults(
        self, ask: Callable[[], _T], what: str, n_bytes_here: Callable[[], int]
    ) -> _T:
        from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

        furthest = n_faults = 0
        while True:
            try:
                return ask()
            except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
                reason = self._passing_reason(error)
            n_faults = 1 if n_bytes_here() > furthest else n_faults + 1
            furthest = max(furthest, n_bytes_here())
            if n_faults >= self._retry.tries:
                raise DownloadError(f"{what}, because {reason}. {GO_ON}")
            doubled_s = self._retry.first_wait_s * 2 ** (n_faults - 1)
            self._retry.sleep(min(doubled_s, self._retry.longest_wait_s))

    def _passing_reason(self, error: Exception) -> str:
        """What went wrong this time; raises our error if another try would meet it again."""
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
        from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

        if isinstance(error, HfHubHTTPError):
            return self._passing_refusal(error)
        if isinstance(error, HFValidationError):
            raise UnknownModelError(
                f"{self.repo_id!r} cannot be a hub repository, expected a name like owner/model."
            ) from None
        if isinstance(error, OfflineModeIsEnabled):
            raise DownloadError(
                f"{self.repo_id}: HF_HUB_OFFLINE forbids the network, and not everything is here "
                "yet. Unset it and run the same command again."
            ) from None
        is_address = isinstance(error, httpx.UnsupportedProtocol)
        if isinstance(error, httpx.TransportError) and not is_address:
            return f"the line to {self._endpoint} broke ({str(error) or type(error).__name__})"
        if isinstance(error, OSError):
            if error.errno is not None:
                raise error
            # The library's consistency check; only its first line says what was found.
            return str(error).partition("\n")[0].rstrip(".")
        raise DownloadError(
            f"{self.repo_id}: {self._endpoint} cannot be used, or is no hub ({error}). "
            "Check HF_ENDPOINT, HF_TOKEN and the proxy settings."
        ) from error

    def _passing_refusal(self, error: HfHubHTTPError) -> str:
        from huggingface_hub import errors

        response, status = error.response, error.response.status_code
        # A storage server's signed addresses expire; the next try gets a new one from the hub.
        from_storage = any(step.url.netloc != response.url.netloc for step in response.history)
        if status in (408, 416, 429) or status >= 500 or from_storage:
            return f"the hub answered {status}"
        if isinstance(error, errors.RemoteEntryNotFoundError):
            raise DownloadError(
                f"{self.repo_id}: the hub answered {status} for {response.url.path}, a file of its "
                "own list. The repository may have been changed or withdrawn."
            ) from None
        if isinstance(error, errors.RevisionNotFoundError):
            raise UnknownModelError(
                f"{self.repo_id}: the hub knows no such revision ({status})."
            ) from None
        if isinstance(error, errors.GatedRepoError) or (
            status in (401, 403) and not isinstance(error, errors.RepositoryNotFoundError)
        ):
            raise DownloadError(
                f"{self.repo_id} is gated or private ({status}). Accept its licence at "
                f"{self._endpoint}/{self.repo_id} and set HF_TOKEN to a valid token that may read "
                "it."
            ) from None
        if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
            raise UnknownModelError(
                f"no repository {self.repo_id} on {self._endpoint} ({status}). Check the spelling; "
                "if it is private, set HF_TOKEN."
            ) from None
        raise DownloadError(
            f"{self.repo_id}: the hub answered {status}, expected 200 or 206."
        ) from None


def _lengths_disagree(error: OSError) -> bool:
    """Whether too much or too little came, or the hub holds no more than is here (416).

    The library's check and our Bar raise OSError itself; what else is one tells of something else,
    such as ConnectionError of the offline switch.
    """
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code == 416
    return type(error) is OSError and error.errno is None


def _bar_class(file: HubFile, on_bytes: Callable[[int], None]) -> type:
    class Bar:
        """What `http_get` takes for a tqdm; it draws nothing."""

        def __init__(self, *, initial: int, **_drawing: object) -> None:
            self._n_bytes = initial

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_error: object) -> None: ...

        def update(self, n_bytes: int) -> None:
            self._n_bytes += n_bytes
            # The library compares lengths at the end; a body without one would fill the disk.
            if self._n_bytes > file.bytes:
                raise OSError(f"more than the {file.bytes:,} bytes of the hub's list came")
            on_bytes(self._n_bytes)

    return Bar
