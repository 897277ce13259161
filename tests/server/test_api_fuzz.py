"""Requests made from our own description of the API, right and wrong ones, by schemathesis."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from server.host import Served, new_gemma, serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

#: What an answer must be whatever was asked. (That a request which fits the description is accepted cannot be among
#: them: a description does not say what the context holds.)
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
)


def fuzz(served: Served, seconds: int, folder: Path) -> subprocess.CompletedProcess[str]:
    """Ask for so many seconds."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{served.url}/openapi.json", "--no-color"]
    command += ["--checks", ",".join(CHECKS), "--phases", "examples,coverage,fuzzing", "--max-time", str(seconds)]
    command += [
        "--continue-on-failure",
        "--suppress-health-check",
        "all",
        "--generation-database",
        "none",
        "-n",
        "10000",
    ]
    command += ["--request-timeout", "120", "--seed", "1", "--output-truncate", "true"]
    # A body that is too long is refused with 413 before anyone reads whether it fits its description.
    statuses = [400, 401, 403, 404, 405, 406, 409, 413, 415, 422, 428, 429]
    (folder / "schemathesis.toml").write_text(f"[checks.negative_data_rejection]\nexpected-statuses = {statuses}\n")
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds + 240, cwd=folder, check=False)


def test_whatever_is_asked_is_answered_as_described(tmp_path: Path) -> None:
    """And nothing of it makes the server fail, or is held when all is done."""
    with serving(new_gemma(max_context=48)) as served:
        done = fuzz(served, 30, tmp_path)
        http = served.state.metrics.http
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert not {status for _, status in http if status >= 500}
        answered = {path for path, status in http if status == 200}
        assert {"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize", "/detokenize"} <= answered
        assert sum(http.values()) > 300
        served.nothing_held()
