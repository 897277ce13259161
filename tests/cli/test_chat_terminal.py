"""Markdown that streams into a real terminal (tmux), in scripts whose widths rich and terminals disagree on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[2] / "src"
SCRIPTS = {
    "devanagari": "नमस्ते दुनिया क्षत्रिय विद्यार्थी हिन्दी",
    "tamil": "வணக்கம் உலகம் தமிழ் மொழி ஸ்ரீ",
    "bengali": "নমস্কার বিশ্ব বাংলা ভাষা ক্ষুদ্র",
    "thai": "สวัสดีชาวโลก ภาษาไทย น้ำ ผู้ใหญ่",
    "arabic": "مَرْحَبًا بِالعَالَمِ اللُّغَةُ",
    "hebrew": "שָׁלוֹם עוֹלָם בְּרֵאשִׁית",
    "khmer": "សួស្តី ពិភពលោក ភាសាខ្មែរ",
    "burmese": "မင်္ဂလာပါ ကမ္ဘာ မြန်မာဘာသာ",
    "jamo": "\u1112\u1161\u11ab\u1100\u1173\u11af \u110b\u1161\u11ab\u1102\u1167\u11bc",
    "cjk": "你好世界 日本語の文章 漢字仮名交じり文",
    "emoji": "👨‍👩‍👧‍👦 👍🏽 🏳️‍🌈 🇩🇪 ❤️ 🧑🏿‍🚀",
    "combining": "e\u0301\u0323 o\u0308\u0304 n\u0303\u0330\u0331 Z\u0351\u036b\u0343",
}
PROGRAM = """
import sys, time
from rich.console import Console
from gemcut.cli import chat_view
chat_view._SECONDS_BETWEEN_DRAWINGS = 0.0
text = open(sys.argv[1], encoding="utf-8").read()
with chat_view.MarkdownView(Console(highlight=False)) as view:
    for at in range(0, len(text), 7):
        view.write(text[at : at + 7])
open(sys.argv[2], "w").close()
time.sleep(60)
"""


@pytest.mark.skipif(shutil.which("tmux") is None, reason="needs a terminal: install tmux")
def test_every_word_is_on_the_screen_once(tmp_path: Path) -> None:
    socket = f"gemcut-{uuid.uuid4().hex[:8]}"
    tmux = ["tmux", "-u", "-L", socket, "-f", os.devnull]
    (tmp_path / "show.py").write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(SRC), "LC_ALL": "C.UTF-8", "TERM": "xterm-256color"}
    running = []
    try:
        for name, words in SCRIPTS.items():
            # Numbered words show what is missing or twice, whatever the terminal does to the letters.
            many = (words.split() * 30)[:60]
            text = "# Title\n\n" + " ".join(f"{word} m{i:03d}" for i, word in enumerate(many)) + "\n\nend m999\n"
            source, done = tmp_path / f"{name}.md", tmp_path / f"{name}.done"
            source.write_text(text, encoding="utf-8")
            command = [sys.executable, tmp_path / "show.py", source, done]
            subprocess.run(
                [*tmux, "new-session", "-d", "-s", name, "-x", "40", "-y", "24", *map(str, command)],
                check=True,
                env=environment,
                timeout=20,
            )
            running.append((name, done))
        for name, done in running:
            limit = time.monotonic() + 60
            while not done.exists() and time.monotonic() < limit:
                time.sleep(0.05)
            assert done.exists(), name
            time.sleep(0.2)  # the terminal reads what is in the pipe
            shown = subprocess.run(
                [*tmux, "capture-pane", "-p", "-J", "-S", "-", "-t", name], capture_output=True, timeout=20, check=True
            ).stdout.decode("utf-8", "replace")
            marks = [word for word in "".join(c if c.isascii() else " " for c in shown).split() if word[0] == "m"]
            joined = "".join(shown.split())
            expected = [f"m{i:03d}" for i in range(60)] + ["m999"]
            assert [joined.count(mark) for mark in expected] == [1] * 61, (name, marks)
            assert shown.count("Title") == 1
    finally:
        subprocess.run([*tmux, "kill-server"], check=False, timeout=20, capture_output=True)
