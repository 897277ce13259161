"""/flag of the chat: a report of misuse, written on this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gemcut.cli.chat_input import state_folder
from gemcut.errors import ParameterError
from gemcut.gemma import Gemma
from gemcut.safety.audit import AuditLog
from gemcut.safety.reports import LONGEST_TEXT, Report, reasons


def write_report(
    gemma: Gemma, said: str, answer_id: str, texts: list[str], ask: Callable[[str], str], path: Path | None = None
) -> str:
    """Report an answer: ``said`` is a reason and a comment; the ``texts`` only where the person says so. Gives what to
    tell. Raises ParameterError."""
    if len(texts) < 2:
        raise ParameterError("there is no answer to report yet")
    reason, _, comment = said.partition(" ")
    if not reason:
        raise ParameterError(f"/flag needs a reason: {', '.join(reasons())}")
    Report(answer_id, reason, comment.strip())  # what is wrong is said before anything is asked
    try:
        include = ask("Include the last message and its answer? [y/N]").lower() in ("y", "yes")
    except (EOFError, KeyboardInterrupt):
        include = False
    text = "\n\n".join(texts)[:LONGEST_TEXT] if include else ""
    report = Report(answer_id, reason, comment.strip(), text)
    path = path or state_folder() / "reports.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    model = gemma.source.name if gemma.source is not None else None
    AuditLog(path).write("report", {**report.fields(), "model": model, "config": gemma.config_hash}, safe=True)
    return f"Written to {path}, {'with' if text else 'without'} the texts. Nothing was sent anywhere."
