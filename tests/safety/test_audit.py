"""The audit log and reports of misuse: what is written, what is not, and every way to change a log."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from gemcut.cli.chat_session import ChatSession
from gemcut.errors import ParameterError
from gemcut.safety.audit import AuditLog, chained, read_key, verify
from gemcut.safety.guard import Guard
from gemcut.safety.guard_file import GuardFile
from gemcut.safety.lexicon import Lexicon
from gemcut.server.audit import Audit
from gemcut.server.guards import JudgeDoor
from gemcut.server.state import ServerSettings, ServerState
from server.host import NAME, error_of, new_gemma, serving

from ..cli.conftest import Cli, cli  # noqa: F401


@pytest.fixture
def log(tmp_path: Path) -> AuditLog:
    found = AuditLog(tmp_path / "audit.jsonl")
    for number in range(5):
        found.write("request", {"request": f"r{number}", "blocked": number == 3})
    found.write("report", {"request": "r3", "reason": "hate", "comment": "é\n漢"})
    return found


def test_what_is_written(log: AuditLog) -> None:
    assert verify(log.path).lines == 6
    assert verify(log.path).reports == 1
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [line["n"] for line in lines] == list(range(1, 7))
    again = AuditLog(log.path)  # another process goes on with it
    again.write("request", {"request": "r7"})
    log.write("request", {"request": "r8"})
    assert verify(log.path).lines == 8
    for name in ("", ".key", ".head"):
        assert stat.S_IMODE(os.stat(f"{log.path}{name}").st_mode) == 0o600
    assert log.user("ann") == again.user("ann") != log.user("bob")
    assert "ann" not in log.user("ann")
    assert AuditLog(log.path.with_name("other.jsonl")).user("ann") != log.user("ann")


def _forged(lines: list[bytes], log: AuditLog) -> list[bytes]:
    """A line in the middle, with a chain that somebody computed anew with a key of his own."""
    before, found = "0" * 64, []
    for data in lines:
        line = json.loads(data) | {"blocked": False}
        line["hash"] = before = chained(b"x" * 32, before, line)
        found.append(json.dumps(line).encode())
    return found


CHANGES: dict[str, tuple[Callable[[list[bytes], AuditLog], list[bytes]], str]] = {
    "a word": (lambda x, log: [*x[:3], x[3].replace(b"true", b"false"), *x[4:]], r"line 4: it is forged"),
    "cut in the middle": (lambda x, log: [*x[:2], *x[3:]], r"line 3: it is number 4, expected 3: cut here"),
    "cut in a line": (lambda x, log: [*x[:5], x[5][:40]], r"line 6: it is no line"),
    "cut at the end": (lambda x, log: x[:4], r"it ends at number 4, but 6 were written: cut at the end"),
    "cut at the front": (lambda x, log: x[1:], r"line 1: it is number 2, expected 1"),
    "two swapped": (lambda x, log: [x[1], x[0], *x[2:]], r"line 1: it is number 2"),
    "a line twice": (lambda x, log: [*x[:2], x[1], *x[2:]], r"line 3: it is number 2, expected 3"),
    "forged": (_forged, r"line 1: it is forged"),
    "a purge forged": (
        lambda x, log: [json.dumps({"n": 2, "kind": "purged", "hash": json.loads(x[1])["hash"]}).encode(), *x[2:]],
        r"line 1: it says that lines were purged",
    ),
    "no JSON": (lambda x, log: [*x[:2], b"zorble", *x[3:]], r"line 3: it is no line of an audit log"),
    "another JSON": (lambda x, log: [*x[:2], b"[1]", *x[3:]], r"line 3: it is no line of an audit log"),
    "nothing": (lambda x, log: [], r"it ends at number 0, but 6 were written"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_log_that_was_changed(log: AuditLog, change: str, cli: Cli) -> None:  # noqa: F811
    work, message = CHANGES[change]
    lines = work(log.path.read_bytes().splitlines(), log)
    log.path.write_bytes(b"".join(line + b"\n" for line in lines))
    with pytest.raises(ParameterError, match=message):
        verify(log.path)
    run = cli("safety", "log", "verify", log.path)
    assert run.code == 2
    assert run.error.startswith("error: ")
    assert len(run.error) < 300


def test_files_beside_it(log: AuditLog, cli: Cli) -> None:  # noqa: F811
    head, key = (Path(f"{log.path}.{name}") for name in ("head", "key"))
    before = head.read_bytes()
    found = json.loads(before)
    head.write_text(json.dumps(found | {"n": 3}))
    assert "is forged" in cli("safety", "log", "verify", log.path).error
    head.write_text("zorble")
    assert "is damaged" in cli("safety", "log", "verify", log.path).error
    head.unlink()
    assert "is missing, which says where the log ends" in cli("safety", "log", "verify", log.path).error
    head.write_bytes(before)
    with open(log.path, "ab") as file:
        file.write(b'{"n": 7')
    with pytest.raises(ParameterError, match="ends in the middle of a line"):
        log.write("request", {})
    key.unlink()
    assert "without it nothing can be verified" in cli("safety", "log", "verify", log.path).error
    key.write_text("12")
    assert "is no key" in cli("safety", "log", "verify", log.path).error
    assert cli("safety", "log", "verify", log.path.with_name("none")).code == 2


def test_a_crash_between_the_line_and_the_head_loses_nothing(log: AuditLog) -> None:
    head = Path(f"{log.path}.head")
    before = head.read_bytes()
    log.write("request", {"request": "r6"})
    head.write_bytes(before)
    assert verify(log.path).lines == 7
    AuditLog(log.path).write("request", {"request": "r7"})
    assert verify(log.path).lines == 8


def test_purge(log: AuditLog, cli: Cli) -> None:  # noqa: F811
    assert log.purge(timedelta(days=1)) == 0
    key, before, lines = read_key(log.path, make=False), "0" * 64, []
    for data in log.path.read_bytes().splitlines():  # as if the first four were of last year
        line = json.loads(data)
        if line["n"] <= 4:
            line["time"] = line["time"].replace("20", "19", 1)
        line["hash"] = before = chained(key, before, line)
        lines.append(json.dumps(line).encode())
    log.path.write_bytes(b"\n".join(lines) + b"\n")
    from gemcut.safety.audit import write_head

    write_head(log.path, key, 6, before)
    run = cli("safety", "log", "purge", log.path, "--older-than", "90d")
    assert run.out.endswith(": 4 lines were dropped\n")
    assert "r1" not in log.path.read_text()
    assert verify(log.path).lines == 3  # two, and one that says what was purged
    log.write("request", {"request": "r9"})
    assert cli("safety", "log", "verify", log.path).out.endswith("none was changed\n")
    lines = log.path.read_bytes().splitlines()
    log.path.write_bytes(b"\n".join(lines[:1] + lines[2:]) + b"\n")
    assert "cut here" in cli("safety", "log", "verify", log.path).error
    assert "expected an age" in cli("safety", "log", "purge", log.path, "--older-than", "soon").error


def test_the_server_writes_decisions_and_reports_and_no_text(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("zorble\n")
    spec = {"kind": "http", "url": "http://127.0.0.1:1", "policies": ["hate"]}
    judge = Lexicon.read(tmp_path / "words.txt", "hate")
    door = JudgeDoor(Guard(GuardFile.of({"judge": [spec]}, "guard.toml"), [(judge, ("hate",))]))
    log = AuditLog(tmp_path / "audit.jsonl")
    state = ServerState(ServerSettings(names=(NAME,)), judges=door, audit=Audit(log))
    with serving(new_gemma(), state) as served:
        assert "reports" in served.client().models.retrieve(NAME).model_dump()["capabilities"]
        answer = served.chat(user="ann@example.org").json()
        assert served.chat(messages=[{"role": "user", "content": "a zorble"}]).status_code == 400
        report = {"request_id": answer["id"], "reason": "hate", "comment": "It was rude.", "user": "ann@example.org"}
        taken = served.http.post("/v1/reports", json=report)
        assert (taken.status_code, taken.json()["object"]) == (200, "report")
        post = served.http.post
        bad = post("/v1/reports", json={**report, "text": "x" * 100_000})
        assert (bad.status_code, error_of(bad)["code"]) == (413, "body_too_large")
        for fields in ({"reason": "zorble"}, {"comment": "x" * 5000}, {"text": "x" * 30_000}, {"who": "me"}):
            bad = post("/v1/reports", json={**report, **fields})
            assert bad.status_code == 400
            assert "\n" not in error_of(bad)["message"]
        assert post("/v1/reports", content=b"{", headers={"content-type": "application/json"}).status_code == 400
    state.audit.close()  # type: ignore[union-attr]
    assert verify(log.path).lines == 3
    first, second, third = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert (first["request"], first["blocked"], first["input"]["flagged"]) == (answer["id"][9:], False, [])
    assert (second["status"], second["blocked"], second["input"]["flagged"]) == (400, True, ["hate"])
    assert (third["request"], third["reason"], third["comment"]) == (first["request"], "hate", "It was rude.")
    assert first["user"] == third["user"] == log.user("ann@example.org")
    assert first["config"] == served.gemma.config_hash
    plain = log.path.read_text()
    for text in ("zorble", "ann@example", "Name a colour", answer["choices"][0]["message"]["content"]):
        assert text not in plain


def test_a_server_without_a_log() -> None:
    with serving(new_gemma()) as served:
        policy = served.http.get("/v1/policy").json()
        assert policy["prohibited_use_policy"] in served.http.get("/").text
        assert (len(policy["limitations"]), policy["reports"]) == (5, False)
        assert "dangerous, illegal or malicious activities" in policy["headings"]
        bad = served.http.post("/v1/reports", json={"request_id": "a", "reason": "hate"})
        assert (bad.status_code, error_of(bad)["code"]) == (400, "no_audit_log")


def test_flag_in_the_chat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "state" / "reports.jsonl"
    gemma = new_gemma()
    answers = iter(["n", "y"])
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        session = ChatSession(gemma, {"seed": 7, "max_new_tokens": 6}, markdown=False, reports=path)
        session._input.ask = lambda question: next(answers)  # type: ignore[method-assign]
        pipe.send_text("/flag hate\rHello\r/flag\r/flag zorble\r/flag hate It was rude.\r/flag other\r\x04")
        session.run()
    shown = " ".join(capsys.readouterr().out.split())
    for part in ("there is no answer to report yet", "/flag needs a reason: dangerous", "reason is 'zorble'"):
        assert part in shown
    assert verify(path).reports == 2
    first, second = [json.loads(line) for line in path.read_text().splitlines()]
    assert (first["comment"], "text" in first, first["request"]) == ("It was rude.", False, second["request"])
    assert second["text"].startswith("Hello\n\n")
