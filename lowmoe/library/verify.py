"""Every byte of a model folder, held against its hash.

Knows:        spans, the headers that other people's readers of safetensors read.
Ignorant of:  which folder; how progress is shown.
"""

from collections.abc import Callable

from lowmoe.checkpoint.folder import ModelFolder
from lowmoe.checkpoint.layout import Place
from lowmoe.checkpoint.safetensors_file import SafetensorsFile
from lowmoe.errors import FolderError


def verify(folder: ModelFolder, report: Callable[[int, int], None]) -> None:
    """Read every byte of a model folder.  report: bytes done and in all.

    Raises FolderError for a span, CheckpointError for a header that was damaged.
    """
    spans = folder.manifest.spans
    _verify_headers(folder)
    total, done = sum(s.place.n_bytes for s in spans.values()), 0
    for name, span in spans.items():
        folder.read(name)
        done += span.place.n_bytes
        report(done, total)
    for name in folder.manifest.small_files:
        folder.small_file(name)


def _verify_headers(folder: ModelFolder) -> None:
    """We never read them; other people's readers of safetensors do."""
    spans = folder.manifest.spans
    for file in sorted({span.place.file for span in spans.values()}):
        found = SafetensorsFile.open(folder.path / file).tensors
        places = {name: Place(file, e.offset, e.n_bytes) for name, e in found.items()}
        wanted = {name: s.place for name, s in spans.items() if s.place.file == file}
        if places != wanted:
            name = min(n for n in {*places, *wanted} if places.get(n) != wanted.get(n))
            raise FolderError(
                f"{folder.path / file}: its header and the manifest disagree about {name}. "
                "The file was damaged; make the model again."
            )
