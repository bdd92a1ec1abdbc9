"""What goes wrong on the page is kept from harm, and said in words."""

import pytest

from lowmoe.errors import LowMoeError
from lowmoe.server.app import ServerOptions
from lowmoe.server.asking import Failed
from tests.server.fake_service import Gate, Script, saying
from tests.server.in_browser.visit import Open
from tests.server.line import line_to

pytestmark = pytest.mark.browser

KEY = "a-key"
HOSTILE = """Before <script>window.broken = 1</script> and <img src=x onerror="window.broken = 2">

<iframe srcdoc="<script>parent.broken = 3</script>"></iframe>

[a link](javascript:window.broken=4) and [another](data:text/html,<script>1</script>) and
<a href="javascript:window.broken=5">a third</a>, ![an image](http://elsewhere.example/seen.png)

<svg><g/onload=window.broken=6></svg> <form action=/v1/models><button name=app>press</button></form>

`<b onclick=alert()>` is code. <div style="position:fixed;inset:0" id="app">over everything</div>
"""


def test_nothing_that_a_model_writes_runs_or_reaches_out(visit: Open) -> None:
    asked: list[str] = []
    v = visit(saying(*HOSTILE.splitlines(keepends=True), thinking=[HOSTILE]))
    v.page.locator(".state.on").wait_for()
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


def test_a_browser_that_keeps_nothing_converses_all_the_same(visit: Open) -> None:
    v = visit()
    for name in ("localStorage", "sessionStorage"):
        throwing = "get() { throw new Error('forbidden'); }"
        v.page.add_init_script(f"Object.defineProperty(window, '{name}', {{{throwing}}})")
    v.page.reload()
    v.say("Hi")
    v.wait_for("Hello world")
    v.wait_for_end()
    assert v.answers() == ["Hello world"]
