"""The disk at work while torch is imported, which takes about a second in which it would rest.

Knows:        which bytes of a model folder every run begins with: its dense weights.
Ignorant of:  what they are for, who reads them then; torch.
"""

import threading
from contextlib import suppress

from lowmoe.checkpoint.file_names import DENSE_FILE
from lowmoe.checkpoint.files import take_into_page_cache
from lowmoe.engine.memory import available_ram_bytes
from lowmoe.errors import LowMoeError
from lowmoe.library.names import locate, made_folder
from lowmoe.settings import Settings

N_READERS, PIECE_BYTES = 4, 64 * 2**20  # several at once keep the disk busy; in the file's order
# Of what RAM is free: dense weights stand there twice for a while, and what leaves the page cache
# before it was used has been read for nothing.
SHARE = 0.5


def begin_early_reads(model: str, settings: Settings) -> list[threading.Thread]:
    """Begin to read the dense weights of what MODEL stands for, if there is a model folder of it.

    Whatever is wrong with MODEL is said by whoever loads it.  Returns the threads that read; nobody
    needs to wait for them.
    """
    with suppress(LowMoeError, OSError):
        folder = made_folder(locate(model, settings), settings)
        if folder is None:
            return []
        path = folder / DENSE_FILE
        n_bytes = min(path.stat().st_size, int(SHARE * available_ram_bytes()))

        def read(number: int) -> None:
            for offset in range(number * PIECE_BYTES, n_bytes, N_READERS * PIECE_BYTES):
                take_into_page_cache(path, offset, min(PIECE_BYTES, n_bytes - offset))

        threads = [
            threading.Thread(target=read, args=(number,), name="lowmoe-early", daemon=True)
            for number in range(N_READERS)
        ]
        for thread in threads:
            thread.start()
        return threads
    return []
