"""The page around a conversation: list, search, files, settings, key, loading, errors, keyboard, themes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gemcut.cli.conversation import Conversation

from .conftest import PHONE, Open, Tab
from .scripted import Body, Script


def _last(body: Body) -> list[str]:
    return ["You said: ", body["messages"][-1]["content"]]


def test_search_rename_delete_undo(open_page: Open) -> None:
    tab = open_page(Script(say=_last))
    for text in ("Apples and pears", "Bicycles", "Clouds"):
        tab.page.click("#new")
        tab.ask(text)
    assert tab.titles() == ["Clouds", "Bicycles", "Apples and pears"]
    for query, titles in (("you said: bic", ["Bicycles"]), ("PEARS apples", ["Apples and pears"]), ("zebra", [])):
        tab.page.fill("#search", query)
        assert tab.titles() == titles
    assert "zebra" in tab.page.locator("#list").inner_text()
    tab.page.fill("#search", "")
    tab.use("Rename", "Bicycles")
    tab.page.get_by_label("New title").fill("Two wheels")
    tab.page.keyboard.press("Enter")
    assert tab.titles() == ["Clouds", "Two wheels", "Apples and pears"]
    tab.use("Rename", "Clouds")
    tab.page.get_by_label("New title").fill("Rain")
    tab.page.keyboard.press("Escape")
    assert tab.titles()[0] == "Clouds"
    tab.use("Delete", "Clouds")
    tab.page.get_by_text("“Clouds” was deleted.").wait_for()
    assert tab.titles() == ["Two wheels", "Apples and pears"]
    assert tab.messages() == []
    tab.page.get_by_role("button", name="Undo").click()
    tab.page.get_by_text("You said: Clouds").wait_for()
    tab.page.reload()
    tab.page.locator("#model").wait_for()
    assert sorted(tab.titles()) == ["Apples and pears", "Clouds", "Two wheels"]


def test_export_and_import_give_the_same(open_page: Open, upload: Callable[[Tab, str], None], tmp_path: Path) -> None:
    tab = open_page(Script(say=_last))
    tab.ask("Cats\n\nand **dogs**")
    tab.press("retry")
    tab.page.locator(".versions").wait_for()
    tab.page.locator("#send").wait_for()
    with tab.page.expect_download() as started:
        tab.page.click("#export")
    started.value.save_as(tmp_path / "all.json")
    text = (tmp_path / "all.json").read_text("utf-8")
    (first,) = json.loads(text)["conversations"]
    assert [message["role"] for message in first["messages"]] == ["user", "assistant", "assistant"]
    tab.use("Delete", "Cats")
    upload(tab, text)
    tab.page.locator(".versions").wait_for()
    assert tab.messages() == ["Cats\n\nand **dogs**", "You said: Cats\n\nand dogs"]
    assert tab.page.locator(".versions").inner_text() == "2/2"
    assert tab.titles() == ["Cats"]


def test_the_command_line_reads_an_export(open_page: Open, upload: Callable[[Tab, str], None], tmp_path: Path) -> None:
    """`gemcut chat --load` goes on with a conversation of the page, and the page with one of `/save`."""
    tab = open_page(Script(say=_last))
    tab.page.click("#settings-open")
    tab.page.fill("#system", "Be brief.")
    tab.page.get_by_role("button", name="Save").click()
    tab.ask("Größe?")
    with tab.page.expect_download() as started:
        tab.use("Export", "Größe?")
    assert started.value.suggested_filename == "groe.json"
    started.value.save_as(tmp_path / "one.json")
    loaded = Conversation.load(tmp_path / "one.json")
    assert loaded.system == "Be brief."
    assert [turn["content"] for turn in loaded.turns] == ["Größe?", "You said: Größe?"]
    loaded.add("And now?", "Still.")
    loaded.save(tmp_path / "saved.json", "m")
    upload(tab, (tmp_path / "saved.json").read_text("utf-8"))
    tab.page.get_by_text("Still.").wait_for()
    assert tab.messages() == ["Größe?", "You said: Größe?", "And now?", "Still."]
    tab.ask("More")
    assert tab.script.chats[-1]["messages"][0] == {"role": "system", "content": "Be brief."}


def test_settings_go_with_the_request(open_page: Open) -> None:
    tab = open_page()
    tab.page.click("#settings-open")
    shown = {name: tab.page.get_attribute(f"#field-{name}", "placeholder") for name in ("temperature", "top_k", "seed")}
    assert shown == {"temperature": "0.7", "top_k": "64", "seed": "random"}
    values = {"temperature": "0", "top_p": "0.5", "max_tokens": "17", "seed": "-3", "stop": "END\n###"}
    for name, value in values.items():
        tab.page.fill(f"#field-{name}", value)
    tab.page.fill("#system", "  Answer in verse.\n")
    tab.page.get_by_role("button", name="Save").click()
    expected = {"temperature": 0, "top_p": 0.5, "max_tokens": 17, "seed": -3, "stop": ["END", "###"]}
    for _ in range(2):
        tab.ask("Hello")
        body = tab.script.chats[-1]
        assert {name: body[name] for name in expected} == expected
        assert set(body) - set(expected) == {"model", "messages", "stream", "stream_options"}
        assert body["messages"][0] == {"role": "system", "content": "Answer in verse."}
        tab.page.reload()
        tab.page.locator("#model").wait_for()
    tab.page.click("#settings-open")
    tab.page.get_by_text("Use the server's defaults").click()
    tab.page.get_by_role("button", name="Save").click()
    tab.ask("Hello")
    assert not set(expected) & set(tab.script.chats[-1])


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("temperature", "2.5", "Temperature must be from 0 to 2."),
        ("top_p", "0", "Top p must be above 0 up to 1."),
        ("max_tokens", "0", "Longest answer must be at least 1."),
        ("max_tokens", "1.5", "Longest answer must be a whole number."),
        ("seed", "1e300", "Seed must be a whole number."),
        ("stop", "a\nb\nc\nd\ne", "At most 4 stop texts; 5 are here."),
    ],
)
def test_a_bad_setting_is_marked_and_not_taken(open_page: Open, name: str, value: str, said: str) -> None:
    tab = open_page()
    tab.page.click("#settings-open")
    tab.page.fill(f"#field-{name}", value)
    tab.page.get_by_role("button", name="Save").click()
    assert tab.page.locator(f"#field-{name}-error").inner_text() == said
    assert tab.page.get_attribute(f"#field-{name}", "aria-invalid") == "true"
    assert tab.page.evaluate("document.activeElement.id") == f"field-{name}"
    assert tab.page.evaluate("localStorage.getItem('gemcut-sampling')") is None


def test_it_can_be_used_while_the_model_loads(open_page: Open) -> None:
    tab = open_page(Script(ready=(503, {"status": "loading", "stage": "reading weights"})), ready=False)
    tab.page.get_by_text("The model is loading: reading weights.").wait_for()
    tab.begin("Early")
    tab.page.get_by_text("Waiting for the server…").wait_for()
    assert tab.script.chats == []
    tab.script.ready = (503, {"status": "loading", "stage": "loading", "done": 252, "total": 1000})
    tab.page.get_by_text("The model is loading: 25 %.").wait_for()
    tab.script.ready = (200, {"status": "ready"})
    tab.page.get_by_text("Hello there.").wait_for()
    assert not tab.page.locator("#banner").is_visible()
    assert tab.script.chats[0]["messages"] == [{"role": "user", "content": "Early"}]


def test_waiting_can_be_given_up(open_page: Open) -> None:
    tab = open_page(Script(ready=(503, {"status": "draining"})), ready=False)
    tab.page.get_by_text("The server is shutting down.").wait_for()
    tab.begin("Late")
    tab.page.click("#stop")
    tab.page.locator("#send").wait_for()
    assert tab.messages() == ["Late"]


def test_a_key_is_asked_for_and_stays_in_the_tab(open_page: Open) -> None:
    tab = open_page(Script(key="sk-right"), ready=False)
    tab.page.locator("#key[open]").wait_for()
    tab.page.fill("#key-text", "sk-wrong")
    tab.page.keyboard.press("Enter")
    tab.page.get_by_text("The server did not take the key.").wait_for()
    tab.page.fill("#key-text", "sk-right")
    tab.page.keyboard.press("Enter")
    tab.page.locator("#model").wait_for()
    tab.ask("Hello")
    assert tab.answer().inner_text() == "Hello there."
    tab.page.reload()
    tab.page.locator("#model").wait_for()  # it is not asked for again
    assert tab.page.evaluate("JSON.stringify(localStorage)").find("sk-right") == -1
    assert tab.page.evaluate("sessionStorage.getItem('gemcut-api-key')") == "sk-right"
    tab.page.click("#settings-open")
    tab.page.get_by_role("button", name="Forget it").click()
    tab.page.keyboard.press("Escape")
    assert tab.page.evaluate("sessionStorage.length") == 0
    tab.begin("Again")
    tab.page.locator("#key[open]").wait_for()


FAILURES = [
    ((400, {"error": {"message": "the context has 8,192", "code": "context_length_exceeded"}}), "Start a new conv"),
    ((429, {"error": {"message": "too many requests"}}), "Too many requests."),
    ((500, {"error": "flat text"}), "Flat text."),
    ((502, {"detail": []}), "The server answered 502"),
    ((0, {}), "The server cannot be reached."),
]


def test_an_error_is_told_and_can_be_tried_again(open_page: Open) -> None:
    tab = open_page()
    for failure, said in FAILURES:
        tab.page.click("#new")
        tab.script.failures = [failure]
        tab.ask("Hello")
        notice = tab.page.locator(".toast.wrong")
        assert said in notice.inner_text()
        assert tab.messages() == ["Hello"]
        notice.get_by_text("Try again").click()
        tab.page.get_by_text("Hello there.").wait_for()
        assert tab.messages() == ["Hello", "Hello there."]
        assert tab.page.locator(".versions").count() == 0


def test_an_error_in_the_middle_keeps_what_had_come(open_page: Open) -> None:
    tab = open_page(Script(say=lambda body: ["Half ", "an answer ", "and more"], break_after=2))
    tab.ask("Hello")
    assert tab.messages() == ["Hello", "Half an answer"]
    assert tab.page.locator(".message.assistant .note").inner_text() == "The answer ended with an error."
    assert "The engine stopped." in tab.page.locator(".toast.wrong").inner_text()


def test_a_base_model_is_said_to_be_one(open_page: Open) -> None:
    script = Script(say=lambda body: [" Paris", "."])
    script.model = {**script.model, "id": "gemma-3-270m", "instruction_tuned": False}
    tab = open_page(script)
    assert "base model" in tab.page.locator("#model").inner_text()
    assert "was not tuned to answer" in tab.page.locator("#welcome").inner_text()
    tab.ask("The capital of France is")
    tab.ask("The capital of Italy is")
    tab.press("continue")
    tab.page.get_by_text("Paris. Paris.").wait_for()
    prompts = [body["prompt"] for body in tab.script.chats]  # it continues a text: no roles, no template
    assert prompts == [
        "The capital of France is",
        "The capital of France is Paris.\nThe capital of Italy is",
        "The capital of France is Paris.\nThe capital of Italy is Paris.",
    ]
    assert tab.script.paths.count("/v1/completions") == 3
    assert set(tab.script.chats[0]) == {"model", "prompt", "max_tokens", "stream", "stream_options"}


def test_a_tuned_model_is_said_to_be_none(open_page: Open) -> None:
    assert "base model" not in open_page().page.locator("body").inner_text()


def test_the_keyboard_is_enough(open_page: Open) -> None:
    tab = open_page(Script(say=_last))
    page = tab.page
    page.keyboard.type("One")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    page.get_by_text("You said: One").wait_for()
    assert tab.script.chats[0]["messages"][0]["content"] == "One\ntwo"
    page.locator("#send").wait_for()
    page.keyboard.press("Alt+r")
    page.locator(".versions").wait_for()
    page.locator("#send").wait_for()
    page.keyboard.press("Alt+c")
    page.locator("#stop").wait_for(state="hidden")
    page.locator("#send").wait_for()
    assert len(tab.script.chats) == 3
    assert tab.script.chats[-1]["continue_final_message"] is True
    page.keyboard.press("Control+/")
    assert page.locator("#help[open] kbd").count() > 12
    page.keyboard.press("Escape")
    page.keyboard.press("Control+k")
    assert page.evaluate("document.activeElement.id") == "search"
    page.keyboard.press("Alt+b")
    assert not page.locator("#side").is_visible()
    page.keyboard.press("Alt+b")
    page.keyboard.press("Alt+n")
    assert tab.messages() == []
    assert page.evaluate("document.activeElement.id") == "box"
    page.keyboard.press("Alt+s")
    assert page.locator("#settings").is_visible()


def test_the_theme_is_the_systems_until_one_is_chosen(open_page: Open) -> None:
    tab = open_page()
    theme = "document.documentElement.dataset.theme"
    for scheme in ("light", "dark"):
        tab.page.emulate_media(color_scheme=scheme)
        tab.page.locator(f'html[data-theme="{scheme}"]').wait_for()
    for chosen in ("light", "dark", "dark"):  # system again: dark
        tab.page.click("#theme")
        assert tab.page.evaluate(theme) == chosen
    tab.page.click("#theme")
    tab.page.reload()
    assert tab.page.evaluate(theme) == "light"
    tab.page.emulate_media(color_scheme="light")


def test_a_phone_has_a_drawer(open_page: Open) -> None:
    tab = open_page(Script(say=_last), viewport=PHONE, has_touch=True, is_mobile=True)
    side = tab.page.locator("#side")
    assert not side.is_visible()
    tab.ask("Hello " * 30)
    assert tab.page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    tab.page.click("#side-open")
    assert side.is_visible()
    tab.page.locator("#veil").click(position={"x": 370, "y": 400})
    assert not side.is_visible()
    tab.page.fill("#box", "a")
    tab.page.keyboard.press("Enter")  # a new line there
    assert tab.page.input_value("#box") == "a\n"


def test_code_can_be_copied(open_page: Open) -> None:
    code = "if a < b:\n    print('x')  # &amp;"
    tab = open_page(Script(say=lambda body: [f"```python\n{code}\n```"]))
    tab.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.ask("Code")
    tab.page.get_by_role("button", name="Copy code").click()
    tab.page.get_by_text("Copied").first.wait_for()
    assert tab.page.evaluate("navigator.clipboard.readText()") == code
    tab.page.locator(".message.assistant").get_by_label("Copy", exact=True).click()
    tab.page.locator("#status").get_by_text("Copied").wait_for(state="attached")
    assert tab.page.evaluate("navigator.clipboard.readText()") == f"```python\n{code}\n```"
