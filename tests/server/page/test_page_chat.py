"""A conversation on the page: answers as they come, stop, reload, edit, retry, continue, versions."""

from __future__ import annotations

import time

from .conftest import Open, Tab
from .scripted import Body, Script


def _last(body: Body) -> list[str]:
    """Say the last message back, in two pieces."""
    return ["You said: ", body["messages"][-1]["content"]]


def _slowly(tab: Tab, text: str) -> None:
    """Begin an answer of a thousand slow pieces and wait for the first ones."""
    tab.script.say, tab.script.pause = (lambda body: [f"{i} " for i in range(1000)]), 0.01
    tab.begin(text)
    tab.page.get_by_text("0 1 2").wait_for()


def _until(what: str, holds: object) -> None:
    for _ in range(200):
        if holds():  # type: ignore[operator]
            return
        time.sleep(0.02)
    raise AssertionError(what)


def test_an_answer_with_its_facts(open_page: Open) -> None:
    tab = open_page(Script(say=lambda body: ["**Bold", "** and `code`", ".\n\n- one\n- two"]))
    tab.ask("Hello")
    assert tab.answer().locator("strong").inner_text() == "Bold"
    assert tab.answer().locator("code").inner_text() == "code"
    assert tab.answer().locator("li").all_inner_texts() == ["one", "two"]
    assert tab.page.locator(".message .stats").inner_text() == "3 tokens · 42.5 tokens/s"
    assert tab.page.locator("#context-text").inner_text() == "103 of 8,192 tokens"
    assert tab.page.locator("#speed").inner_text() == "42.5 tokens/s"
    assert tab.page.locator("#title").inner_text() == "Hello"
    assert tab.page.locator("#status").inner_text() == "The answer is complete"
    assert tab.page.evaluate("document.activeElement.id") == "box"
    body = tab.script.chats[0]
    assert body["messages"] == [{"role": "user", "content": "Hello"}]
    assert body["model"] == "gemma-test-it"
    assert body["stream"] is True
    assert body["stream_options"] == {"include_usage": True}
    assert set(body) == {"model", "messages", "stream", "stream_options"}  # no setting was chosen, none is sent
    tab.ask("More")
    assert [message["role"] for message in tab.script.chats[1]["messages"]] == ["user", "assistant", "user"]
    assert tab.script.chats[1]["messages"][1]["content"] == "**Bold** and `code`.\n\n- one\n- two"


def test_the_text_grows_while_it_is_written(open_page: Open) -> None:
    tab = open_page()
    _slowly(tab, "Count")
    early = len(tab.answer().inner_text())
    _until("the text grows", lambda: len(tab.answer().inner_text()) > early + 20)
    assert tab.page.locator(".message.assistant").get_attribute("aria-busy") == "true"
    _until("a speed is shown", lambda: "tokens/s" in tab.page.locator("#speed").inner_text())
    assert tab.page.locator("#context-text").inner_text().startswith("≈ ")


def test_stop_ends_it_at_the_server_too(open_page: Open) -> None:
    tab = open_page()
    for stop in (lambda: tab.page.click("#stop"), lambda: tab.page.keyboard.press("Escape")):
        before = tab.script.left
        _slowly(tab, "Count")
        stop()
        tab.page.locator("#send").wait_for()
        _until("the server sees the client leave", lambda before=before: tab.script.left == before + 1)
        assert tab.page.locator(".message.assistant .note").last.inner_text() == "Stopped."
        assert tab.answer().inner_text().startswith("0 1 2")
        tab.page.click("#new")


def test_stop_before_the_first_piece_leaves_the_question(open_page: Open) -> None:
    tab = open_page(Script(pause=0.5))
    tab.begin("Slow one")
    tab.page.click("#stop")
    tab.page.locator("#send").wait_for()
    assert tab.messages() == ["Slow one"]
    tab.script.pause = 0
    tab.press("retry")
    tab.page.get_by_text("Hello there.").wait_for()
    assert tab.messages() == ["Slow one", "Hello there."]


def test_reload_keeps_conversations(open_page: Open) -> None:
    tab = open_page(Script(say=_last))
    tab.ask("First")
    tab.page.click("#new")
    tab.ask("Second")
    tab.page.reload()
    tab.page.locator("#model").wait_for()
    assert tab.titles() == ["Second", "First"]
    assert tab.messages() == ["Second", "You said: Second"]
    tab.page.get_by_role("button", name="First", exact=True).click()
    assert tab.messages() == ["First", "You said: First"]


def test_reload_in_the_middle_keeps_what_had_come(open_page: Open) -> None:
    """All of it, also what came since the page last wrote it down, which it does once a second."""
    tab = open_page()
    _slowly(tab, "Count")
    tab.page.get_by_text("9 10 11").wait_for()
    seen = tab.answer().inner_text()
    tab.page.reload()
    tab.page.locator(".message.assistant").wait_for()
    _until("the server sees the client leave", lambda: tab.script.left == 1)
    assert tab.messages()[1].startswith(seen)
    assert tab.page.locator(".message.assistant .note").inner_text() == "The answer was cut off."


def test_the_page_may_end_while_it_is_hidden(open_page: Open) -> None:
    tab = open_page()
    _slowly(tab, "Count")
    tab.page.get_by_text("9 10 11").wait_for()
    hide = "Object.defineProperty(document, 'hidden', { value: true })"
    nothing = "IDBObjectStore.prototype.put = () => {}"  # from here on: the page is as good as gone
    seen = tab.answer().inner_text()
    tab.page.evaluate(f"{hide}; document.dispatchEvent(new Event('visibilitychange')); {nothing}")
    tab.page.reload()
    tab.page.locator(".message.assistant").wait_for()
    assert tab.messages()[1].startswith(seen)


def test_edit_and_send_makes_a_version(open_page: Open) -> None:
    tab = open_page(Script(say=_last))
    tab.ask("Cats")
    tab.ask("Why?")
    tab.page.locator('.message.user [data-do="edit"]').first.click(force=True)
    tab.page.locator(".editor textarea").fill("Dogs")
    tab.page.get_by_role("button", name="Send", exact=True).and_(tab.page.locator(".editor button")).click()
    tab.page.get_by_text("You said: Dogs").wait_for()
    assert tab.messages() == ["Dogs", "You said: Dogs"]
    assert tab.script.chats[-1]["messages"] == [{"role": "user", "content": "Dogs"}]
    versions = tab.page.locator(".message.user .versions")
    assert versions.inner_text() == "2/2"
    versions.get_by_label("Earlier version").click(force=True)
    assert tab.messages() == ["Cats", "You said: Cats", "Why?", "You said: Why?"]


def test_edit_without_sending_changes_the_text_alone(open_page: Open) -> None:
    tab = open_page(Script(say=_last))
    tab.ask("Cats")
    for role, text in (("user", "Dogs"), ("assistant", "Wuff.")):
        tab.page.locator(f'.message.{role} [data-do="edit"]').click(force=True)
        tab.page.locator(".editor textarea").fill(text)
        tab.page.locator(".editor").get_by_text("Save").click()
    assert tab.messages() == ["Dogs", "Wuff."]
    assert len(tab.script.chats) == 1
    assert tab.page.locator(".versions").count() == 0
    tab.ask("Go on")
    assert [message["content"] for message in tab.script.chats[-1]["messages"]] == ["Dogs", "Wuff.", "Go on"]


def test_an_edit_can_be_given_up(open_page: Open) -> None:
    tab = open_page()
    tab.ask("Cats")
    tab.page.locator("#box").press("ArrowUp")
    tab.page.locator(".editor textarea").fill("Dogs")
    tab.page.locator(".editor textarea").press("Escape")
    assert tab.messages() == ["Cats", "Hello there."]
    assert tab.page.locator(".editor").count() == 0


def test_try_again_keeps_the_first_answer(open_page: Open) -> None:
    answers = iter(["one", "two"])
    tab = open_page(Script(say=lambda body: [next(answers)]))
    tab.ask("Count")
    tab.press("retry")
    tab.page.get_by_text("two").wait_for()
    assert tab.messages() == ["Count", "two"]
    assert tab.script.chats[0]["messages"] == tab.script.chats[1]["messages"]
    tab.page.locator(".message.assistant").get_by_label("Earlier version").click()
    assert tab.messages() == ["Count", "one"]
    assert tab.page.locator(".versions").inner_text() == "1/2"


def test_continue_goes_on_in_the_same_answer(open_page: Open) -> None:
    tab = open_page(Script(say=lambda body: ["It was a dark"], finish="length"))
    tab.ask("A story")
    assert tab.page.locator(".message.assistant .note").inner_text() == "The answer reached its longest length."
    tab.script.say, tab.script.finish = (lambda body: [" and stormy", " night."]), "stop"
    tab.press("continue")
    tab.page.get_by_text("It was a dark and stormy night.").wait_for()
    tab.page.locator("#send").wait_for()
    body = tab.script.chats[1]
    assert body["continue_final_message"] is True
    assert body["messages"][-1] == {"role": "assistant", "content": "It was a dark"}
    assert tab.messages() == ["A story", "It was a dark and stormy night."]
    assert not tab.page.locator(".message.assistant .note").is_visible()


def test_an_answer_goes_on_while_another_conversation_is_read(open_page: Open) -> None:
    tab = open_page()
    tab.ask("Other")
    tab.page.click("#new")
    _slowly(tab, "Count")
    tab.page.get_by_role("button", name="Other", exact=True).click()
    assert tab.messages() == ["Other", "Hello there."]
    tab.page.get_by_role("button", name="Count", exact=True).click()
    early = len(tab.answer().inner_text())
    _until("the text grows", lambda: len(tab.answer().inner_text()) > early)
    tab.page.click("#stop")
    tab.page.locator("#send").wait_for()
    assert tab.messages()[0] == "Count"


def test_two_tabs_agree(open_page: Open) -> None:
    first = open_page(Script(say=_last))
    second = open_page(beside=first)
    first.ask("From the first")
    second.page.get_by_role("button", name="From the first", exact=True).click()
    assert second.messages() == ["From the first", "You said: From the first"]
    first.ask("Again")
    second.page.get_by_text("You said: Again").wait_for()
