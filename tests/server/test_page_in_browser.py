"""The page as people meet it, in headless Chromium.

Needs the extra `browser`, `chromium` on the path, and for axe-core npm; the command is in
CONTRIBUTING.md.
"""

import base64
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from lowmoe.errors import LowMoeError
from lowmoe.server.app import ServerOptions
from lowmoe.server.asking import Failed
from lowmoe.server.page_routes import PAGE
from tests.server.fake_service import FakeService, Gate, Script, saying
from tests.server.fake_watch import FakeWatch
from tests.server.line import line_to
from tests.server.serving import serving

pytestmark = pytest.mark.browser

AXE = "axe-core@4.14.1"
KEY = "a-key"
DESKTOP, PHONE = (1280, 800), (360, 740)
HOSTILE = """Before <script>window.broken = 1</script> and <img src=x onerror="window.broken = 2">

<iframe srcdoc="<script>parent.broken = 3</script>"></iframe>

[a link](javascript:window.broken=4) and [another](data:text/html,<script>1</script>) and
<a href="javascript:window.broken=5">a third</a>, ![an image](http://elsewhere.example/seen.png)

<svg><g/onload=window.broken=6></svg> <form action=/v1/models><button name=app>press</button></form>

`<b onclick=alert()>` is code. <div style="position:fixed;inset:0" id="app">over everything</div>
"""
RICH = """# Title

A `word`, [a link](https://example.org).

```py
x = 1
```

|a|b|
|-|-|
|1|2|
"""


# --- what tests need


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright import sync_api

    program = shutil.which("chromium")
    assert program, "no chromium on the path. Install it, with apt-get install chromium."
    with sync_api.sync_playwright() as playwright:
        # Without a sandbox of its own, which root may not make: what runs here is the page alone.
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    return _of_npm(AXE, "package/axe.min.js", tmp_path_factory.mktemp("npm")).decode()


def _of_npm(package: str, name: str, folder: Path) -> bytes:
    """A file of a package as it was published.  Skips where npm is not there to ask for it."""
    with tarfile.open(_packed(package, folder)) as packed:
        member = packed.extractfile(name)
        assert member is not None
        return member.read()


def _packed(package: str, folder: Path) -> Path:
    if shutil.which("npm") is None:
        pytest.skip("npm is not there")
    told = subprocess.run(
        ["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True
    )
    return folder / told.stdout.strip()


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


Open = Callable[..., Visit]


@pytest.fixture
def visit(chromium: Any) -> Iterator[Open]:
    """Opens the page of a server with these scripts."""
    with ExitStack() as closing:

        def opened(
            *scripts: Script,
            size: tuple[int, int] = DESKTOP,
            options: ServerOptions | None = None,
            watch: FakeWatch | None = None,
            **of_context: Any,
        ) -> Visit:
            service = FakeService(scripts or [saying("Hello", " world")])
            watch = watch or FakeWatch()
            address = closing.enter_context(serving(service, options, watch=watch))
            viewport = {"width": size[0], "height": size[1]}
            context = chromium.new_context(viewport=viewport, **of_context)
            closing.callback(context.close)
            context.set_default_timeout(10_000)
            visit = Visit(context.new_page(), service, address)
            visit.page.goto(address)
            return visit

        yield opened


# --- a conversation


def test_a_whole_conversation(visit: Open) -> None:
    v = visit(
        saying("It is **blue", "**, mostly.", thinking=["Hm", ", blue?"]),
        saying("Because of", " air."),
    )
    v.say("What colour is the sky?")
    v.wait_for("mostly")
    v.wait_for_end()
    v.say("Why?")
    v.wait_for("air")
    v.wait_for_end()
    assert v.answers() == ["It is blue, mostly.", "Because of air."]
    assert v.page.locator(".assistant strong").inner_text() == "blue"
    prompt = [(m.role, m.content) for m in v.service.asks[1].prompt]
    assert prompt == [
        ("user", "What colour is the sky?"),
        ("assistant", "It is **blue**, mostly."),
        ("user", "Why?"),
    ]
    thought = v.page.locator(".thought")
    assert not thought.is_visible()
    v.page.locator(".thinking summary").click()
    assert thought.inner_text() == "Hm, blue?"
    assert "4 tokens" in v.page.locator(".usage").first.inner_text()
    assert "first after" in v.page.locator(".usage").first.inner_text()
    assert not v.complaints


def test_an_answer_can_be_stopped_and_what_came_is_kept(visit: Open) -> None:
    gate = Gate()
    v = visit([*saying("Far", " away")[:2], gate, *saying(" a time")])
    v.say("Tell me a story")
    v.wait_for("Far away")
    v.page.get_by_label("Stop the answer").click()
    v.wait_for("Stopped.")
    assert v.service.cancelled.get(timeout=5).ask.prompt
    assert v.answers() == ["Far away"]


def test_escape_stops_too(visit: Open) -> None:
    v = visit([*saying("Far", " away")[:2], Gate()])
    v.say("Tell me a story")
    v.wait_for("Far away")
    v.page.keyboard.press("Escape")
    v.wait_for("Stopped.")
    assert v.service.cancelled.get(timeout=5)


def test_a_conversation_and_what_one_was_writing_outlive_a_reload(visit: Open) -> None:
    v = visit()
    v.say("Hi")
    v.wait_for("Hello world")
    v.wait_for_end()
    v.page.get_by_label("Your message").fill("half a thou")
    v.page.reload()
    v.wait_for("Hello world")
    assert (v.said(), v.answers()) == (["Hi"], ["Hello world"])
    assert v.page.get_by_label("Your message").input_value() == "half a thou"


def test_an_answer_under_way_when_the_page_is_left_says_so(visit: Open) -> None:
    v = visit([*saying("Far", " away")[:2], Gate()])
    v.say("Tell me a story")
    v.wait_for("Far away")
    v.page.reload()
    v.wait_for("The page was left while this was being written.")
    assert v.answers() == ["Far away"]


def test_an_earlier_message_is_edited_and_asked_again_and_that_undone(visit: Open) -> None:
    v = visit(saying("One."), saying("Two."), saying("Three."))
    for question, answer in (("first", "One."), ("second", "Two.")):
        v.say(question)
        v.wait_for(answer)
        v.wait_for_end()
    v.page.locator(".user").first.get_by_role("button", name="Edit").click()
    v.page.get_by_label("Edit your message").fill("first, but better")
    v.page.get_by_role("button", name="Ask again").click()
    v.wait_for("Three.")
    v.wait_for_end()
    assert (v.said(), v.answers()) == (["first, but better"], ["Three."])
    assert [m.content for m in v.service.asks[2].prompt] == ["first, but better"]
    v.page.get_by_role("button", name="Undo").click()
    v.wait_for("Two.")
    assert (v.said(), v.answers()) == (["first", "second"], ["One.", "Two."])


def test_an_answer_is_made_again_from_the_same_question(visit: Open) -> None:
    v = visit(saying("One."), saying("Two."))
    v.say("Hi")
    v.wait_for("One.")
    v.page.get_by_role("button", name="Again").click()
    v.wait_for("Two.")
    assert v.answers() == ["Two."]
    assert v.service.asks[0].prompt == v.service.asks[1].prompt


def test_a_new_conversation_begins_with_nothing_and_can_be_undone(visit: Open) -> None:
    v = visit()
    v.say("Hi")
    v.wait_for("Hello world")
    v.wait_for_end()
    v.page.get_by_label("New conversation").click()
    v.wait_for("Ask the experts.")
    assert v.said() == []
    v.page.get_by_role("button", name="Undo").click()
    v.wait_for("Hello world")
    assert v.said() == ["Hi"]


def test_what_is_set_is_asked_for_and_kept(visit: Open) -> None:
    v = visit()
    v.page.get_by_label("How to answer").click()
    v.page.get_by_label("System prompt").fill("Be brief.")
    v.page.get_by_label("Temperature").fill("0.5")
    v.page.get_by_label("Most tokens").fill("12")
    v.page.get_by_label("Thinking first").select_option("no")
    v.page.get_by_role("button", name="Save").click()
    v.page.reload()
    v.say("Hi")
    v.wait_for("Hello world")
    (ask,) = v.service.asks
    assert [(m.role, m.content) for m in ask.prompt] == [("system", "Be brief."), ("user", "Hi")]
    assert (ask.sampling.temperature, ask.sampling.max_new_tokens) == (0.5, 12)
    assert (ask.sampling.top_p, ask.think) == (None, False)


def test_the_oldest_turns_are_left_out_when_the_context_is_full(visit: Open) -> None:
    v = visit(saying("One."), saying("Two."), saying("Three."))
    v.page.locator(".state.on").wait_for()
    for question, answer in (("first", "One."), ("second", "Two.")):
        v.say(question)
        v.wait_for(answer)
        v.wait_for_end()
    assert v.page.locator(".left-out").count() == 0
    v.service.n_prompt = 4000  # of 4096, whatever is left out
    v.say("third")
    v.wait_for("Three.")
    v.wait_for_end()
    assert [m.content for m in v.service.asks[2].prompt] == ["third"]
    assert v.said() == ["first", "second", "third"]
    v.page.reload()
    v.page.locator(".left-out").wait_for()


def test_two_messages_without_an_answer_between_are_asked_as_one(visit: Open) -> None:
    v = visit([Failed(LowMoeError("the disk is gone"))], saying("Two."))
    v.say("first")
    v.page.get_by_role("alert").wait_for()
    v.say("second")
    v.wait_for("Two.")
    assert [m.content for m in v.service.asks[1].prompt] == ["first\n\nsecond"]


# --- what goes wrong


def test_nothing_that_a_model_writes_runs_or_reaches_out(visit: Open) -> None:
    asked: list[str] = []
    v = visit(saying(*HOSTILE.splitlines(keepends=True), thinking=[HOSTILE]))
    v.page.on("request", lambda request: asked.append(request.url))
    v.page.on("dialog", lambda dialog: asked.append(dialog.message))
    v.say("Hi")
    v.wait_for_end()
    v.page.locator(".thinking summary").click()
    for link in v.page.locator(".markdown a").all():
        assert (link.get_attribute("href") or "http://").startswith(("http://", "https://"))
    assert v.page.evaluate("window.broken") is None
    shown = v.page.locator(".markdown")
    assert shown.locator("script, img, iframe, svg, form, [style], [id], [onerror]").count() == 0
    # The page's icon may still be on its way.
    own = {f"{v.address}/v1/chat/completions", f"{v.address}/page/icon.svg"}
    assert f"{v.address}/v1/chat/completions" in asked
    assert set(asked) <= own
    assert "<script>window.broken = 1</script>" in shown.inner_text()


def test_a_connection_that_breaks_in_mid_answer_leaves_what_came_and_a_way_on(visit: Open) -> None:
    v = visit([*saying("Far", " away")[:2], Gate()], saying("Whole."))
    with line_to(int(v.address.rpartition(":")[2])) as line:
        v.page.goto(f"http://127.0.0.1:{line.port}")
        v.say("Tell me a story")
        v.wait_for("Far away")
        line.cut()
        v.wait_for("The connection broke in mid-answer. What came is kept.")
        v.wait_for("no connection")
        assert v.answers() == ["Far away"]
        v.page.get_by_role("button", name="Try again").click()
        v.wait_for("The server cannot be reached. Is lowmoe serve still running?")
        line.mend()
        v.page.locator(".state.on").wait_for()
        v.page.get_by_role("button", name="Try again").click()
        v.wait_for("Whole.")
        assert (v.said(), v.answers()) == (["Tell me a story"], ["Whole."])


def test_a_connection_that_goes_silent_is_given_up(visit: Open) -> None:
    v = visit([*saying("Far", " away")[:2], Gate()])
    v.page.clock.install()
    v.say("Tell me a story")
    v.wait_for("Far away")
    v.page.clock.fast_forward(31_000)
    v.wait_for("The connection broke in mid-answer. What came is kept.")


def test_an_error_in_mid_answer_is_said_in_words_and_can_be_tried_again(visit: Open) -> None:
    failing: Script = [*saying("Far", " away")[:2], Failed(LowMoeError("the disk is gone"))]
    v = visit(failing, saying("Whole."))
    v.say("Tell me a story")
    v.page.get_by_role("alert").wait_for()
    assert v.answers() == ["Far away"]
    v.page.get_by_role("button", name="Try again").click()
    v.wait_for("Whole.")
    assert v.answers() == ["Whole."]


def test_a_key_is_asked_for_once_and_a_wrong_one_again(visit: Open) -> None:
    v = visit(options=ServerOptions(api_key=KEY))
    v.wait_for("This server wants a key")
    v.page.get_by_label("Key", exact=True).fill("another")
    v.page.get_by_role("button", name="Go on").click()
    v.wait_for("not the right one")
    v.page.get_by_label("Key", exact=True).fill(KEY)
    v.page.get_by_role("button", name="Go on").click()
    v.page.locator(".state.on").wait_for()
    v.say("Hi")
    v.wait_for("Hello world")
    v.page.reload()
    v.page.locator(".state.on").wait_for()
    assert v.page.get_by_role("dialog").count() == 0


# --- how it looks and is reached


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_nothing_keeps_anybody_out(
    visit: Open, axe: str, scheme: str, size: tuple[int, int]
) -> None:
    v = visit(saying(RICH, thinking=["Hm"]), size=size, color_scheme=scheme)
    states = [lambda: v.wait_for("Ask the experts.")]
    states.append(lambda: (v.say("Hi"), v.wait_for("Title"), v.wait_for_end()))
    states.append(lambda: v.page.locator(".user").get_by_role("button", name="Edit").click())
    if size == PHONE:
        states.append(lambda: v.page.get_by_role("button", name="The machine").click())
    states.append(lambda: v.page.get_by_text("as a table").click())
    states.append(lambda: v.page.get_by_label("How to answer").click())
    for begin in states:
        begin()
        # Evaluated as a debugger does, which the page's policy does not hold for.
        v.page.evaluate(axe)
        told = v.page.evaluate("axe.run({resultTypes: ['violations']})")
        found = [(rule["id"], [n["html"] for n in rule["nodes"]]) for rule in told["violations"]]
        assert found == []


def test_a_phone_shows_all_of_it_without_scrolling_sideways(visit: Open) -> None:
    long = (
        "word" * 60 + "\n\n```\n" + "x" * 200 + "\n```\n\n" + "|a" * 30 + "|\n" + "|-" * 30 + "|\n"
    )
    v = visit(saying(long), size=PHONE, watch=FakeWatch((256,) * 61))
    v.say("Hi " + "x" * 100)
    v.wait_for("wordword")
    v.wait_for_end()
    wide = "document.documentElement.scrollWidth"
    assert v.page.evaluate(wide) == PHONE[0]
    v.page.get_by_role("button", name="The machine").click()
    v.wait_for("Read for a token")
    assert v.page.evaluate(wide) == PHONE[0]
    v.page.get_by_label("How to answer").click()
    assert v.page.evaluate(wide) == PHONE[0]


def test_colours_follow_the_system_until_one_chooses(visit: Open) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    v = visit(color_scheme="dark")
    dark = v.page.evaluate(paper)
    v.page.get_by_label("Colours: system").click()
    light = v.page.evaluate(paper)
    v.page.reload()
    assert v.page.evaluate(paper) == light
    v.page.get_by_label("Colours: light").click()
    v.page.emulate_media(color_scheme="light")
    assert v.page.evaluate(paper) == dark != light
    v.page.get_by_label("Colours: dark").click()
    assert v.page.evaluate(paper) == light


def test_an_expert_is_told_by_pointer_and_by_keys_and_in_a_table(visit: Open) -> None:
    v = visit(watch=FakeWatch(used_at_once=0))
    v.page.locator(".speed").wait_for()
    canvas = v.page.locator("canvas")
    box = canvas.bounding_box()
    assert box is not None
    # The first layer has no experts, so the second row is layer 2; its third cell is expert 2,
    # the seventh of all, which are in the tiers in turn.
    v.page.mouse.move(box["x"] + box["width"] * 2.5 / 4, box["y"] + box["height"] * 1.5 / 3)
    assert v.page.locator(".tip").inner_text() == "Layer 2, expert 2: on the GPU, used 0 times"
    canvas.focus()
    v.page.keyboard.press("ArrowRight")
    v.page.keyboard.press("ArrowDown")
    assert "Layer 3, expert 3" in v.page.locator(".tip").inner_text()
    v.page.get_by_text("as a table").click()
    v.page.locator(".panel tbody").wait_for()
    rows = v.page.locator(".panel tbody tr").all_inner_texts()
    assert [row.split("\t")[:4] for row in rows] == [
        ["1", "2", "1", "1"],
        ["2", "1", "2", "1"],
        ["3", "1", "1", "2"],
    ]


def test_experts_light_up_as_they_are_used_and_go_out(visit: Open) -> None:
    v = visit(watch=FakeWatch(used_at_once=0))
    v.page.locator(".speed").wait_for()
    lit = """async () => {
        const {Grid} = await import("/page/grid.js");
        const canvas = document.querySelector("canvas");
        const context = canvas.getContext("2d");
        const at = (i) => [...context.getImageData(
            (i + 0.4) * canvas.width / 4, 0.4 * canvas.height / 3, 1, 1).data].join();
        const frames = (n) => new Promise((then) => {
            const next = () => n-- > 0 ? requestAnimationFrame(next) : then();
            next();
        });
        let grid;
        const wake = Grid.prototype.wake;
        Grid.prototype.wake = function () { grid = this; wake.call(this); };
        while (!grid) await frames(1);
        const rest = at(1);
        grid.light([1], [1]);
        await frames(10);
        const hot = at(1);
        while (grid.asked) await frames(1);
        return [rest, hot, at(1)];
    }"""
    rest, hot, after = v.page.evaluate(lit)
    assert hot != rest
    assert after == rest


def test_a_model_of_many_experts_is_drawn_in_a_fraction_of_a_frame(visit: Open) -> None:
    v = visit(watch=FakeWatch((256,) * 61, used_at_once=8))
    v.page.locator(".speed").wait_for()
    cost = """async () => {
        const {Grid} = await import("/page/grid.js");
        const [frame, took] = [Grid.prototype.frame, []];
        await new Promise((then) => {
            Grid.prototype.frame = function (now) {
                const began = performance.now();
                frame.call(this, now);
                took.push(performance.now() - began);
                if (took.length === 60) then();
            };
        });
        return took.sort((a, b) => a - b)[30];
    }"""
    # The median: 0.3 ms on a core of a Zen 5 that draws without a GPU; a frame has 16.7.
    assert v.page.evaluate(cost) < 8


@pytest.mark.parametrize(("motion", "least", "most"), [("no-preference", 4, 99), ("reduce", 2, 2)])
def test_with_reduced_motion_nothing_fades(visit: Open, motion: str, least: int, most: int) -> None:
    v = visit(watch=FakeWatch(used_at_once=0), reduced_motion=motion)
    v.page.locator(".speed").wait_for()
    colours = """async () => {
        const {Grid} = await import("/page/grid.js");
        const [frame, seen] = [Grid.prototype.frame, []];
        let lit = false;
        await new Promise((then) => {
            Grid.prototype.frame = function (now) {
                frame.call(this, now);
                if (!lit) this.light([1], [1]);
                lit = true;
                seen.push(this.pixels[1]);
                if (new Set(seen).size > 1 && seen.at(-1) === seen[0]) then();
            };
        });
        return new Set(seen).size;
    }"""
    assert least <= v.page.evaluate(colours) <= most
    assert v.page.evaluate("document.getAnimations().length") == 0 or motion != "reduce"


# --- the whole of it


def test_the_demo_model_answers_in_a_browser(chromium: Any, tmp_path: Path) -> None:
    environment = {**os.environ, "LOWMOE_HOME": str(tmp_path)}
    command = [
        sys.executable,
        "-c",
        "from lowmoe.cli.app import main; main()",
        "serve",
        "--port",
        "0",
        "--gpu",
        "none",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as server:
        try:
            assert server.stdout is not None
            address = next(w for w in server.stdout.readline().split() if w.startswith("http://"))
            context = chromium.new_context()
            context.set_default_timeout(20_000)
            v = Visit(context.new_page(), FakeService(), address.rstrip(":,"))
            v.page.goto(v.address)
            v.say("Once upon a time")
            v.wait_for_end()
            assert len(v.answers()[0]) > 20
            v.page.locator(".headline strong", has_text=re.compile("[0-9]")).wait_for()
            assert "64" in v.page.locator(".legend").inner_text()
            assert not v.complaints
            context.close()
        finally:
            server.send_signal(signal.SIGINT)
            assert server.wait(20) in (0, 130)


def test_vendored_files_are_in_the_tarballs_that_were_published(tmp_path: Path) -> None:
    for library in json.loads((PAGE / "vendor/vendored.json").read_text("utf-8")):
        tarball = _packed(f"{library['name']}@{library['version']}", tmp_path)
        digest = base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()
        assert f"sha512-{digest}" == library["integrity"]
        with tarfile.open(tarball) as packed:
            for name, told in library["files"].items():
                member = packed.extractfile(told["in_tarball"])
                assert member is not None
                assert member.read() == (PAGE / "vendor" / name).read_bytes()
