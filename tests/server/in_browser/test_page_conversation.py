"""A conversation on the page: had, stopped, kept, edited, made anew."""

import pytest

from lowmoe.errors import LowMoeError
from lowmoe.server.asking import Failed
from tests.server.fake_service import Gate, saying
from tests.server.in_browser.visit import Open

pytestmark = pytest.mark.browser


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
