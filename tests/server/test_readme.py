"""What README.md tells people to type to serve a model, on the real Gemma 3 270M."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest

import support
from cli.documented import shell_lines
from gemcut.gemma import Gemma

from .test_command import running


@pytest.mark.slow
def test_serve_it() -> None:
    support.gguf_path()  # skips where the demo extra is not installed
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    text = (support.ROOT / "README.md").read_text("utf-8")
    section = text.partition("\n## Serve it\n")[2].partition("\n## ")[0]
    (serve,) = [line for line in shell_lines(section) if line.startswith("gemcut serve")]
    (fence,) = [block for block in re.findall(r"```\n(.*?)```", section, re.DOTALL) if block.startswith("curl")]
    curl = shlex.split(fence.replace("\\\n", " "))
    server = (support.ROOT / "docs" / "server.md").read_text("utf-8")
    snippets = [code for code in re.findall(r"```python\n(.*?)```", server, re.DOTALL) if "from openai" in code]
    written: list[str] = []
    with running(*shlex.split(serve)[2:]) as (process, client):
        process.said("^ready: gemma-3-270m at ")
        url = str(client.base_url).rstrip("/")
        words = [word.replace("http://127.0.0.1:8000", url) for word in curl]
        done = subprocess.run([*words, "-sS"], capture_output=True, text=True, check=True)
        answer = json.loads(done.stdout)
        for code in snippets:
            code = code.replace("http://127.0.0.1:8000", url).replace('"2b-it"', '"gemma-3-270m"')
            assert "stream=True" in code
            code = code.replace("stream=True", "stream=True, temperature=0, max_tokens=6")
            run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            written.append(run.stdout)
        page = client.get("/")
        assert (page.status_code, page.headers["content-type"].partition(";")[0]) == (200, "text/html")
    body = json.loads(curl[curl.index("-d") + 1])
    gemma = Gemma.load("gemma-3-270m", progress=False)
    right = gemma.generate(body["prompt"], max_new_tokens=body["max_tokens"], temperature=body["temperature"])
    asked = [{"role": "user", "content": "Name three colours."}]
    told = [gemma.chat(asked, max_new_tokens=6, temperature=0)]
    assert answer["choices"][0]["text"] == right
    assert right
    assert written == told
