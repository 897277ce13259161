"""The page on the real server: a tiny network, and Gemma 3 270M."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

import support
from gemcut import Gemma
from server.host import Served, new_gemma, serving, slow_down

from .conftest import WATCH

pytestmark = pytest.mark.slow


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    context.set_default_timeout(60_000)
    context.add_init_script(WATCH)
    page = context.new_page()
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    yield page
    assert page.evaluate("window.violations") == []
    assert len({url.split("/")[2] for url in requests}) <= 1  # none where the test was skipped
    context.close()


def _say(page: Any, text: str) -> str:
    page.fill("#box", text)
    page.keyboard.press("Enter")
    page.locator("#send").wait_for()
    return str(page.locator(".message.assistant .body").last.inner_text())


def _set(page: Any, **values: object) -> None:
    page.click("#settings-open")
    for name, value in values.items():
        page.fill(f"#field-{name}", str(value))
    page.get_by_role("button", name="Save").click()


def test_a_tiny_network(page: Any) -> None:
    """Settings, usage, continuing and stopping go through the real API; what is stopped leaves the engine."""
    gemma = new_gemma()
    with serving(gemma) as served:
        page.goto(served.url)
        page.get_by_text("tiny").wait_for()
        _set(page, temperature=0, max_tokens=12)
        _say(page, "Name a colour.")
        page.locator(".message .stats").get_by_text("12 tokens").wait_for()
        assert page.locator(".message.assistant .note").inner_text() == "The answer reached its longest length."
        direct = served.chat(messages=[{"role": "user", "content": "Name a colour."}], temperature=0, max_tokens=12)
        said = direct.json()
        shown = page.evaluate(
            """async () => {
              const { Store } = await import("/page/store.js");
              const store = new Store();
              await store.open();
              return store.all()[0].messages.at(-1);
            }"""
        )
        assert shown["text"] == said["choices"][0]["message"]["content"]
        usage = said["usage"]
        assert (shown["stats"]["prompt"], shown["stats"]["completion"]) == (usage["prompt_tokens"], 12)
        total = usage["prompt_tokens"] + 12
        assert page.locator("#context-text").inner_text() == f"{total} of {gemma.engine.max_context} tokens"
        page.locator('[data-do="continue"]').click()
        page.locator("#stop").wait_for(state="hidden")
        assert len(page.locator(".message.assistant").all()) == 1
        _set(page, max_tokens=400)
        slow_down(gemma, 0.05)
        page.fill("#box", "Again")
        page.keyboard.press("Enter")
        page.locator(".message.assistant.busy .body:not(:empty)").last.wait_for()
        page.keyboard.press("Escape")
        page.locator("#send").wait_for()
        served.nothing_held()


def test_errors_of_the_real_server(page: Any) -> None:
    with serving(new_gemma()) as served:
        page.goto(served.url)
        page.get_by_text("tiny").wait_for()
        _set(page, max_tokens=100_000)
        _say_nothing(page, "Hello")
        notice = page.locator(".toast.wrong").inner_text()
        assert "100,000" in notice or "100000" in notice
        assert "512" in notice


def _say_nothing(page: Any, text: str) -> None:
    page.fill("#box", text)
    page.keyboard.press("Enter")
    page.locator(".toast.wrong").wait_for()


def test_the_page_is_usable_while_a_model_loads(page: Any) -> None:
    with serving(None) as served:
        page.goto(served.url)
        page.get_by_text("The model is loading").wait_for()
        _set(page, max_tokens=5)
        page.fill("#box", "Early")
        page.keyboard.press("Enter")
        page.get_by_text("Waiting for the server…").wait_for()
        served.state.gemma = new_gemma()
        page.locator("#send").wait_for()
        page.locator(".message.assistant .stats").wait_for()


def test_a_conversation_with_gemma_3_270m(page: Any) -> None:
    """A base model: the page says so and continues the text, as Gemma.generate does."""
    gemma = Gemma.load(support.gguf_path(), progress=False)
    with serving(gemma) as served:
        page.goto(served.url)
        page.get_by_text("base model").first.wait_for()
        _set(page, temperature=0, max_tokens=12)
        first = _say(page, "The capital of France is")
        prompt = "The capital of France is"
        prompt += gemma.generate(prompt, max_new_tokens=12, temperature=0)
        assert f"The capital of France is {first}".split() == prompt.split()
        second = _say(page, "The capital of Italy is")
        prompt += "\nThe capital of Italy is"
        assert second.split() == gemma.generate(prompt, max_new_tokens=12, temperature=0).split()
        before = len(second)
        page.locator('[data-do="continue"]').last.click()
        page.locator("#stop").wait_for(state="hidden")
        page.locator("#send").wait_for()
        assert len(page.locator(".message.assistant .body").last.inner_text()) > before
        assert float(page.locator("#speed").inner_text().split()[0]) > 0
        page.reload()
        page.locator(".message.assistant").nth(1).wait_for()
        _stops(page, served)


def _stops(page: Any, served: Served) -> None:
    _set(page, max_tokens=2000)
    page.fill("#box", "Once upon a time")
    page.keyboard.press("Enter")
    page.locator(".message.assistant.busy .body:not(:empty)").wait_for()
    page.keyboard.press("Escape")
    page.locator("#send").wait_for()
    begin = time.monotonic()
    served.nothing_held()
    assert time.monotonic() - begin < 20
