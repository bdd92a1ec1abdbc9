"""How the page looks, who can reach what is on it, and what drawing it costs."""

import pytest

from tests.server.fake_service import saying
from tests.server.fake_watch import FakeWatch
from tests.server.in_browser.visit import DESKTOP, PHONE, Open

pytestmark = pytest.mark.browser

RICH = """# Title

A `word`, [a link](https://example.org).

```py
x = 1
```

|a|b|
|-|-|
|1|2|
"""


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
