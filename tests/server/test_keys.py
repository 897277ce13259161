"""API keys: the file that names them, finding one, and its limits."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

import pytest

import support
from gemcut.errors import ParameterError
from gemcut.server.errors import ApiError
from gemcut.server.keys import ApiKey, Keys, Limits, read_keys
from gemcut.server.limits import Bucket, Use

ALICE, BOB = "alice-0123456789abcdef", "bob-0123456789abcdef"


def written(folder: Path, text: str | bytes, mode: int = 0o600) -> Path:
    path = folder / "keys.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(mode)
    return path


def test_the_documented_file(tmp_path: Path) -> None:
    page = (support.ROOT / "docs" / "server.md").read_text("utf-8")
    (text,) = re.findall(r"^```toml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    alice, bob = read_keys(written(tmp_path, text)).keys
    assert (alice.name, alice.limits) == ("alice", Limits())
    assert (bob.name, bob.limits) == ("bob", Limits(60, 100_000, 4))


def test_a_file_of_keys(tmp_path: Path) -> None:
    digest = hashlib.sha256(BOB.encode()).hexdigest()
    text = f'alice = "{ALICE}"\n[bob]\nsha256 = "{digest}"\nrequests_per_minute = 60\nconcurrent = 4\n'
    keys = read_keys(written(tmp_path, text))
    assert [key.name for key in keys.keys] == ["alice", "bob"]
    alice, bob = keys.find(ALICE), keys.find(BOB)
    assert alice is not None
    assert (alice.name, alice.limits) == ("alice", Limits())
    assert bob is not None
    assert (bob.name, bob.limits) == ("bob", Limits(requests_per_minute=60, concurrent=4))
    for wrong in ("", ALICE[:-1], ALICE + "0", ALICE.upper(), digest, "alice", "ü", "\udcff"):
        assert keys.find(wrong) is None
    assert ALICE not in repr(keys.keys)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds 0 keys; expected from 1 to 1000"),
        (f'alice = "{ALICE}', r"keys.toml, line 1: this is not TOML; expected TOML such as: alice"),
        (f"{ALICE}\n", "line 1: this is not TOML"),
        (b"\xff\xfe", "keys.toml is not UTF-8"),
        ('alice = "short"', "alice: the key is none; expected 16 to 512 printable ASCII characters without spaces"),
        ('alice = "with spaces 0123456789"', "alice: the key is none"),
        ("alice = 7", "alice: expected a key, or a table with one"),
        ("alice = []", "alice: expected a key, or a table with one"),
        ("[alice]", "alice: expected either key or sha256"),
        (f'[alice]\nkey = "{ALICE}"\nsha256 = "{"0" * 64}"', "alice: expected either key or sha256"),
        ('[alice]\nsha256 = "0"', "alice: sha256 is not one; expected 64 hexadecimal digits"),
        (f'[alice]\nkey = "{ALICE}"\nrpm = 3', "alice: unknown setting 'rpm'; expected one of key, sha256, requests"),
        (f'[alice]\nkey = "{ALICE}"\nconcurrent = 0', "alice: concurrent is not a number of at least 1"),
        (f'[alice]\nkey = "{ALICE}"\nconcurrent = 1.5', "alice: concurrent is 1.5; expected a whole number"),
        (f'[alice]\nkey = "{ALICE}"\ntokens_per_minute = inf', "tokens_per_minute is not a number of at least 1"),
        (f'[alice]\nkey = "{ALICE}"\nrequests_per_minute = true', "requests_per_minute is not a number"),
        (f'"a b" = "{ALICE}"', "a key is named 'a b'; expected letters, digits"),
        (f'a = "{ALICE}"\nb = "{ALICE}"', "a and b have the same key; give each its own"),
        ("\n".join(f'k{n} = "{ALICE}{n}"' for n in range(1001)), "holds 1001 keys"),
        (" " * (1 << 20) + "#", "has more than 1,048,576 bytes"),
        ("[" * 100_000, "this is not TOML"),
    ],
)
def test_a_bad_file_is_refused_in_one_line_that_shows_no_key(tmp_path: Path, text: str | bytes, said: str) -> None:
    with pytest.raises(ParameterError, match=said) as error:
        read_keys(written(tmp_path, text))
    assert ALICE not in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
def test_a_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    text = f'alice = "{ALICE}"'
    for mode in (0o644, 0o604, 0o620, 0o602):
        with pytest.raises(ParameterError, match=rf"mode {mode:04o}, so that others can .*: run chmod 600"):
            read_keys(written(tmp_path, text, mode))
    for mode in (0o600, 0o400, 0o440):
        assert len(read_keys(written(tmp_path, text, mode))) == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ParameterError, match="pipe is not a file"):
        read_keys(tmp_path / "pipe")
    with pytest.raises(ParameterError, match=r"cannot read the API keys in .*: Is a directory"):
        read_keys(tmp_path)
    with pytest.raises(ParameterError, match=r"cannot read the API keys in .*: No such file or directory"):
        read_keys(tmp_path / "none")


def test_all_keys_are_compared_whichever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the time tells nothing."""
    seen: list[bytes] = []

    def compare(one: bytes, other: bytes) -> bool:
        seen.append(one)
        return one == other

    monkeypatch.setattr("hmac.compare_digest", compare)
    keys = Keys([ApiKey(str(n), hashlib.sha256(str(n).encode()).digest()) for n in range(5)])
    for key in ("0", "4", "none"):
        seen.clear()
        keys.find(key)
        assert len(seen) == 5


def test_a_bucket_fills_steadily() -> None:
    bucket = Bucket(60, now=100)
    assert bucket.level(100) == 60
    for _ in range(60):
        assert bucket.wait(1, 100) == 0
        bucket.take(1, 100)
    assert bucket.wait(1, 100) == 1
    assert bucket.wait(1, 100.25) == 0.75
    assert bucket.level(101) == 1
    assert bucket.level(99) == 1  # a clock that went back gives nothing and takes nothing
    assert bucket.level(10_000) == 60
    bucket.take(600, 10_000)
    assert bucket.wait(1, 10_000) == 541


def refusal(use: Use, now: float) -> tuple[str, dict[bytes, bytes]]:
    with pytest.raises(ApiError) as error:
        use.enter(now)
    assert (error.value.status, error.value.code, error.value.type) == (429, "rate_limit_exceeded", "rate_limit_error")
    return error.value.message, dict(error.value.headers)


def test_requests_a_minute() -> None:
    use = Use(Limits(requests_per_minute=2), now=0)
    for left in (1, 0):
        use.enter(0)
        assert dict(use.headers(0))[b"x-ratelimit-remaining-requests"] == b"%d" % left
    message, headers = refusal(use, 0.5)
    assert message == "this key may make 2 requests a minute; try later"
    assert headers[b"retry-after"] == b"30"  # 29.5 seconds, rounded up
    assert headers[b"x-ratelimit-limit-requests"] == b"2"
    assert headers[b"x-ratelimit-remaining-requests"] == b"0"
    assert headers[b"x-ratelimit-reset-requests"] == b"59.500s"
    use.enter(30)
    assert use.open == 3  # a refused request is not under way


def test_tokens_a_minute_count_when_they_are_used() -> None:
    use = Use(Limits(tokens_per_minute=600), now=0)
    use.enter(0)
    use.enter(0)
    use.leave(500, 1)
    use.leave(700, 1)
    message, headers = refusal(use, 1)
    assert message == "this key may use 600 tokens a minute, and has; try later"
    assert headers[b"retry-after"] == b"61"  # 600 below zero, 10 come a second, one must be there
    use.enter(61.2)
    assert use.open == 1


def test_requests_at_one_time() -> None:
    use = Use(Limits(concurrent=2), now=0)
    use.enter(0)
    use.enter(0)
    message, headers = refusal(use, 0)
    assert message == "this key may have 2 requests at one time, and has; wait for one to end"
    assert headers == {b"retry-after": b"1", b"x-should-retry": b"true"}
    use.leave(0, 0)
    use.enter(0)


def test_no_limits_say_nothing() -> None:
    use: Any = Use(Limits(), now=0)
    for _ in range(1000):
        use.enter(0)
    assert use.headers(0) == []
