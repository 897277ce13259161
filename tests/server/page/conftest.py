"""Headless Chromium on the chat page. Skipped, with the reason, where there is no Chromium or no playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from .scripted import Desk, Script, serving

FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
)
NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
PHONE = {"width": 390, "height": 844}
#: Collects what the policy refused; a test that ends with one fails.
WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => {
  window.violations.push(`${event.effectiveDirective} ${event.blockedURI} ${event.sample}`);
});
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, once for a module: as long as it lives no other test of this thread could call ``asyncio.run``."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[dev]'")
    found = os.environ.get("GEMCUT_TEST_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("needs Chromium: apt-get install chromium, or name one in GEMCUT_TEST_CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=FLAGS.split())
        yield chromium
        chromium.close()


@dataclass
class Tab:
    """One page, the server behind it, and what it did.

    Attributes:
        page: playwright's.
        script: the server's.
        url: the server's address.
        requests: addresses that were asked for.
        problems: exceptions that nobody caught, and what the policy refused.
    """

    page: Any
    script: Script
    url: str
    requests: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def ask(self, text: str) -> None:
        """Send a message and wait for the answer's end."""
        before = len(self.script.chats)
        self.begin(text)
        self.page.locator("#send").wait_for()
        assert len(self.script.chats) > before

    def begin(self, text: str) -> None:
        """Send a message."""
        self.page.fill("#box", text)
        self.page.click("#send")

    def answer(self) -> Any:
        """The last answer's body."""
        return self.page.locator(".message.assistant .body").last

    def messages(self) -> list[str]:
        """The texts of all messages that are shown."""
        return [text.strip() for text in self.page.locator(".message .body").all_inner_texts()]

    def press(self, name: str) -> None:
        """Use the last message's button of that name (edit, retry, continue)."""
        button = self.page.locator(f'.message [data-do="{name}"]').last
        button.hover()
        button.click()

    def use(self, what: str, title: str) -> None:
        """Rename, Export or Delete in the list of conversations."""
        self.page.locator("#list li", has_text=title).hover()
        self.page.get_by_label(f"{what} {title}").click()

    def titles(self) -> list[str]:
        """What the list of conversations shows."""
        return list(self.page.locator("#list .open").all_inner_texts())

    def check(self) -> None:
        """Nothing was refused by the policy, nothing was asked of anybody else, no exception was left."""
        self.problems += self.page.evaluate("window.violations || []")
        assert self.problems == []
        foreign = [url for url in self.requests if not url.startswith((self.url, "data:", "blob:"))]
        assert foreign == []


Open = Callable[..., Tab]
#: What is kept in the browser for the address that is open.
FORGET = """
async () => {
  localStorage.clear();
  sessionStorage.clear();
  await new Promise((done) => {
    const request = indexedDB.deleteDatabase("gemcut");
    request.onsuccess = request.onerror = request.onblocked = done;
  });
}
"""


class Windows:
    """Tabs for tests. One window serves nearly all of them, emptied in between: a new one costs a second."""

    def __init__(self, browser: Any, url: str, desk: Desk) -> None:
        self.browser, self.url, self.desk = browser, url, desk
        self.common = self._context({})
        self.page = self.common.new_page()
        self.tabs: list[Tab] = []
        self.extra: list[Any] = []  # pages and contexts of one test
        self._watch(self.page, 0)

    def _context(self, options: dict[str, Any]) -> Any:
        context = self.browser.new_context(**{"viewport": {"width": 1200, "height": 800}, **options})
        context.set_default_timeout(10_000)
        context.add_init_script(WATCH)
        return context

    def _watch(self, page: Any, number: int) -> None:
        page.on("request", lambda request: self.tabs[number].requests.append(request.url))
        page.on("pageerror", lambda error: self.tabs[number].problems.append(str(error)))

    def open(
        self, script: Script | None = None, *, beside: Tab | None = None, ready: bool = True, **options: Any
    ) -> Tab:
        """The page of a server that follows ``script``; with options in a window of its own, ``beside``: with its."""
        if beside is None:
            self.desk.script = script or Script()
        if not self.tabs and not options:
            self.tabs.append(Tab(self.page, self.desk.script, self.url))
            self.page.goto(f"{self.url}/page/gem.svg")
            self.page.evaluate(FORGET)
        else:
            assert self.tabs or options
            context = beside.page.context if beside is not None else self._context(options)
            page = context.new_page()
            self.extra.append(page if beside is not None else context)
            self._watch(page, len(self.tabs))
            self.tabs.append(Tab(page, self.desk.script, self.url))
        tab = self.tabs[-1]
        tab.page.goto(self.url)
        if ready:
            tab.page.locator("#model").wait_for()
        return tab

    def end(self) -> None:
        """Check what the tabs have done, and close those of this test."""
        try:
            for tab in self.tabs:
                tab.check()
        finally:
            for window in self.extra:
                window.close()
            self.page.goto("about:blank")  # ends its requests
            self.tabs.clear()
            self.extra.clear()


@pytest.fixture(scope="module")
def windows(browser: Any) -> Iterator[Windows]:
    desk = Desk(Script())
    with serving(desk) as url:
        made = Windows(browser, url, desk)
        yield made
        made.common.close()


@pytest.fixture
def open_page(windows: Windows) -> Iterator[Open]:
    """Open the page of a server that follows a script: ``Windows.open``."""
    yield windows.open
    windows.end()


@pytest.fixture
def upload(tmp_path: Path) -> Callable[[Tab, str], None]:
    """Import a file of this text."""

    def give(tab: Tab, text: str) -> None:
        path = tmp_path / "import.json"
        path.write_text(text, encoding="utf-8")
        tab.page.set_input_files("#file", path)

    return give
