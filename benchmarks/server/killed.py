"""Does a server that was killed in mid-stream come back as it was?   rounds, files that changed.

Counts:      --rounds times: eight streams, kill -9 at a random moment, every file of the model and
             of lowmoe's home compared by its hash, a new server, a seeded answer as before.

    python -m benchmarks.server.killed [--rounds 20]
"""

import argparse
import asyncio
import hashlib
import json
import os
import random
import shutil
import tempfile
from pathlib import Path

import lowmoe
from benchmarks.server.process import Served, served, text_of
from lowmoe.engine.machine import machine_line

ANSWER = {"model": "demo", "prompt": "Once upon a time", "seed": 1, "max_tokens": 50}


def hashes(folder: Path) -> dict[str, str]:
    """By path, of all files but locks."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".lock"
    }


async def kill(server: Served, chance: random.Random) -> int:
    """In the midst of eight streams; how many of them noticed."""
    body = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 400}
    streams = [asyncio.ensure_future(text_of(server, body)) for _ in range(8)]
    await asyncio.sleep(chance.random())
    server.process.kill()
    server.process.wait()
    told = await asyncio.gather(*streams, return_exceptions=True)
    return sum(isinstance(one, OSError) for one in told)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=20)
    asked = parser.parse_args()
    print(machine_line())
    chance, changed, noticed = random.Random(0), set[str](), []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LOWMOE_HOME"] = f"{folder}/home"
        model = Path(folder) / "demo"
        shutil.copytree(Path(lowmoe.__file__).parent / "demo", model)
        with served(str(model), "--sequences", "8") as server:
            before = asyncio.run(text_of(server, ANSWER))
        wanted = hashes(Path(folder))
        for _ in range(asked.rounds):
            with served(str(model), "--sequences", "8") as server:
                assert asyncio.run(text_of(server, ANSWER)) == before
                noticed.append(asyncio.run(kill(server, chance)))
            found = hashes(Path(folder))
            changed |= {path for path in {*wanted, *found} if wanted.get(path) != found.get(path)}
    print(
        f"{asked.rounds} kills, {sum(noticed)} streams broke off, {len(changed)} files changed"
        f"{': ' if changed else ''}{', '.join(sorted(changed))}"
    )
    print(json.dumps({"noticed": noticed, "changed": sorted(changed)}))


if __name__ == "__main__":
    main()
