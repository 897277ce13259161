"""The page's reports of misuse, and answers that a guard ended."""

from __future__ import annotations

import re

from gemcut.safety.reports import reasons
from gemcut.server.page import page_files

from .conftest import Open
from .scripted import Script


def _script(**options: object) -> Script:
    script = Script(**options)  # type: ignore[arg-type]
    script.model["capabilities"].append("reports")
    return script


def test_a_report_has_the_texts_only_where_the_person_says_so(open_page: Open) -> None:
    tab = open_page(_script())
    tab.ask("Hello")
    page = tab.page
    tab.press("report")
    page.select_option("#report-reason", "harassment")
    page.fill("#report-comment", " rude ")
    page.click("#report-form button[type=submit]")
    page.get_by_text("Your report was taken down.").wait_for()
    assert tab.script.reports == [{"request_id": "chatcmpl-7", "reason": "harassment", "comment": "rude"}]
    tab.press("report")
    assert page.input_value("#report-comment") == ""
    page.check("#report-include")
    page.click("#report-form button[type=submit]")
    page.locator("#report").wait_for(state="hidden")
    assert tab.script.reports[1]["text"] == "Hello\n\nHello there."


def test_a_report_that_fails_keeps_what_was_typed(open_page: Open) -> None:
    tab = open_page(_script())
    tab.ask("Hello")
    tab.press("report")
    tab.script.failures = [(503, {"error": {"message": "the disk is full"}})]
    tab.page.fill("#report-comment", "rude")
    tab.page.click("#report-form button[type=submit]")
    tab.page.get_by_text("The disk is full.").wait_for()
    assert tab.page.input_value("#report-comment") == "rude"
    tab.page.click("#report-form button[type=submit]")
    tab.page.locator("#report").wait_for(state="hidden")
    assert len(tab.script.reports) == 2


def test_no_button_where_the_server_takes_none(open_page: Open) -> None:
    tab = open_page()
    tab.ask("Hello")
    assert tab.page.locator('[data-do="report"]').count() == 0


def test_an_answer_that_a_guard_ended(open_page: Open) -> None:
    tab = open_page(Script(finish="content_filter"))
    tab.ask("Hello")
    assert tab.page.locator(".message.assistant .note").last.inner_text() == "The server's guard ended this answer."


def test_the_reasons_are_the_servers() -> None:
    text = page_files()["/page/report.js"].body.decode()
    assert set(re.findall(r'^  \["([a-z-]+)", "', text, flags=re.MULTILINE)) <= set(reasons())
