"""Drives every client and writes docs/clients.md: what passes, with which version.

    python tests/clients/write_table.py

Knows:        what pytest reports of test_clients.py and test_agents.py.
Ignorant of:  what the tests ask.
"""

import datetime
import re
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent.parent
sys.path.insert(0, str(REPOSITORY))

from tests.clients.driven import CLIENTS, version_of  # noqa: E402
from tests.clients.test_agents import AGENTS, CONTEXT, agent_version  # noqa: E402

WORDS = {"passed": "yes", "failed": "NO", "skipped": "-"}
HEAD = """# Clients

Each of these talks with `lowmoe serve` as a program of its own, pointed at it by what
`lowmoe launch CLIENT --dry-run` prints, and is judged by `tests/clients`: that it lists the model,
gets an answer, streams the same answer, leaves in mid-stream and the server is idle within a
second, forces a call of a tool whose arguments keep to their schema, gets an object that keeps to a
schema, hears as an error of its own that a prompt is too long, and gets two answers at once that
are those it gets one by one. A dash: the client does not offer it.

Written by `python tests/clients/write_table.py` on {date}, with the demo model on a processor.

| client | version | {columns} |
|---|---|{rules}|
"""

AGENTS_HEAD = """
Coding agents send 2,000 to 30,000 tokens before the first word. Here they send them to the demo
model, told that its context is {context} tokens long: its words are nonsense then, and what counts
is that the agent shows them.

| agent | version | one turn |
|---|---|---|
"""


class Reports:
    """Every test's outcome, by client and by what it asks."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        named = re.fullmatch(r".*::test_(\w+)\[(.+)\]", report.nodeid)
        if named is None or (report.when != "call" and report.passed):
            return
        # A skip in the middle and a failure in the set-up count, a tear-down that passes does not.
        self.found.setdefault(named[2], {})[named[1]] = report.outcome


def main() -> int:
    reports = Reports()
    arguments = ["-q", "-m", "clients or not clients", str(REPOSITORY / "tests" / "clients")]
    status = pytest.main(arguments, plugins=[reports])
    behaviours = list(reports.found[CLIENTS[0].title])
    columns = [behaviour.replace("_", " ") for behaviour in behaviours]
    text = HEAD.format(
        date=datetime.datetime.now(tz=datetime.timezone.utc).date(),
        columns=" | ".join(columns),
        rules="|".join("---" for _ in columns),
    )
    for client in CLIENTS:
        found = reports.found.get(client.title, {})
        cells = [WORDS[found[behaviour]] if behaviour in found else "?" for behaviour in behaviours]
        text += f"| {client.title} | {version_of(client)} | {' | '.join(cells)} |\n"
    text += AGENTS_HEAD.format(context=CONTEXT)
    for agent in AGENTS:
        found = reports.found.get(agent.title, {})
        told = WORDS[found["one_turn"]] if found else "?"
        text += f"| {agent.title} | {agent_version(agent)} | {told} |\n"
    (REPOSITORY / "docs" / "clients.md").write_text(text)
    return int(status)


if __name__ == "__main__":
    raise SystemExit(main())
