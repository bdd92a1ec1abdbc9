"""A tab on the page, and what a person does there.

Knows:        where things are on the page.
Ignorant of:  what a test wants of them.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

from tests.server.fake_service import FakeService

DESKTOP, PHONE = (1280, 800), (360, 740)


class Visit:
    """A tab on a page of a server that says what a test told it."""

    def __init__(self, page: Any, service: FakeService, address: str) -> None:
        self.page, self.service, self.address = page, service, address
        self.complaints: list[str] = []
        page.on("console", lambda m: m.type == "error" and self.complaints.append(m.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def say(self, text: str) -> None:
        self.page.get_by_label("Your message").fill(text)
        self.page.keyboard.press("Enter")

    def answers(self) -> list[str]:
        return [a.strip() for a in self.page.locator(".assistant .markdown").all_inner_texts()]

    def said(self) -> list[str]:
        return [a.strip() for a in self.page.locator(".user .said").all_inner_texts()]

    def wait_for_end(self) -> None:
        """Of the last answer."""
        self.page.locator(".assistant").last.locator("footer").wait_for()

    def wait_for(self, text: str) -> None:
        self.page.get_by_text(text).first.wait_for()


# Opens the page of a server with these scripts; see `visit` in conftest.py.
Open: TypeAlias = Callable[..., Visit]
