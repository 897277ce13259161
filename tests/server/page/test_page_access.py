"""axe-core on every state of the page, in both themes and at a phone's width."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import PHONE, Open, Tab
from .scripted import Script

LONG = """# First

Text with **bold**, `code` and [a link](https://example.org/).

### Third

```python
def f(x):  # comment
    return "text", 1, Name(x)
```

| a | b |
|--:|:-:|
| 1 | 2 |

1. one
   - two

> quote
"""


def _violations(tab: Tab, axe: str) -> list[str]:
    # A transition's colours in between are nobody's.
    tab.page.wait_for_function(
        "document.getAnimations().every((one) => one.effect.getTiming().iterations === Infinity)"
    )
    tab.page.evaluate(axe)
    found = tab.page.evaluate("axe.run()")["violations"]
    return [f"{one['id']}: {node['html'][:200]}" for one in found for node in one["nodes"]]


@pytest.mark.slow
@pytest.mark.parametrize("width", ["desktop", "phone"])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing(open_page: Open, theme: str, width: str) -> None:
    package = pytest.importorskip("axe_playwright_python", reason="needs axe: pip install -e '.[dev]'")
    axe = (Path(package.__file__).parent / "axe.min.js").read_text("utf-8")
    size = PHONE if width == "phone" else {"width": 1200, "height": 800}
    # The policy forbids what axe does; all other tests run under it.
    options = {"viewport": size, "color_scheme": theme, "bypass_csp": True, "reduced_motion": "reduce"}
    tab = open_page(Script(say=lambda body: [LONG], finish="length"), **options)
    whole = (theme == "light") == (width == "desktop")  # of the other two what colours and widths change most
    found = {"welcome": _violations(tab, axe)} if whole else {}
    tab.ask("Hello")
    tab.press("retry")
    tab.page.locator(".versions").wait_for()
    tab.page.locator("#send").wait_for()
    tab.script.failures = [(500, {"error": {"message": "it failed"}})]
    tab.ask("More")
    tab.page.locator('.message.user [data-do="edit"]').last.click()
    found["answer, error and editor"] = _violations(tab, axe)
    for name in ("settings", "help", "key") if whole else ("settings",):
        tab.page.evaluate(f"document.getElementById('{name}').showModal()")
        found[name] = _violations(tab, axe)
        tab.page.keyboard.press("Escape")
    if width == "phone":
        tab.page.click("#side-open")
        found["drawer"] = _violations(tab, axe)
    if whole:
        tab.script.model = {**tab.script.model, "instruction_tuned": False}
        tab.script.ready = (503, {"status": "loading", "stage": "reading"})
        tab.page.reload()
        tab.page.locator("#banner").wait_for()
        found["loading"] = _violations(tab, axe)
    assert {name: ones for name, ones in found.items() if ones} == {}


def test_what_a_screen_reader_needs(open_page: Open) -> None:
    tab = open_page(Script(say=lambda body: [LONG]))
    tab.ask("Hello")
    page = tab.page
    assert page.get_by_role("log", name="Conversation").get_attribute("aria-live") == "off"
    levels = page.evaluate('[...document.querySelectorAll("#log :is(h1,h2,h3,h4,h5,h6)")].map((h) => h.localName)')
    assert levels == ["h2", "h2", "h3", "h4"]  # You, the model, First, Third: none left out
    names = page.evaluate(
        '[...document.querySelectorAll("button")].filter((b) => !(b.ariaLabel || b.innerText.trim()))'
    )
    assert names == []
    page.locator(".skip").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "box"
