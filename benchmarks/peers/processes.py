"""Runs one command in a session of its own, if wanted before everybody else's.

Knows:        Linux's scheduling groups.
Ignorant of:  what the command is for.
"""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def last_line(
    command: Sequence[str],
    *,
    autogroup_nice: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> str:
    """The last line a command prints, run from the repository's root; ends here if it fails.

    environment: variables beside those that are set; autogroup_nice: of the session's scheduling
    group (sched(7)), None leaves it alone. Plain nice counts only within a session.
    """
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # and with it a scheduling group
    )
    try:
        if autogroup_nice is not None:
            _prefer(process.pid, autogroup_nice)
        output, _ = process.communicate()
    except BaseException:
        process.kill()
        process.wait()
        raise
    if process.returncode != 0 or not output.strip():
        sys.exit(f"{' '.join(command)} ended with {process.returncode}, expected 0 and a result.")
    return output.splitlines()[-1]


def _prefer(process_id: int, nice: int) -> None:
    try:
        Path(f"/proc/{process_id}/autogroup").write_text(str(nice), "ascii")
    except OSError as error:
        sys.exit(f"autogroup nice {nice} is not allowed here ({error}). Run without it.")
