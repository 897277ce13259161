"""What one API key has used: a bucket of requests, one of tokens, and how many requests are under way."""

from __future__ import annotations

from gemcut.server.errors import ApiError, Headers, retry_headers
from gemcut.server.keys import Limits


class Bucket:
    """Fills steadily up to its size, and may be emptied at once. It may go below zero."""

    def __init__(self, per_minute: float, now: float) -> None:
        self.size, self.rate = per_minute, per_minute / 60
        self._level, self._at = per_minute, now

    def level(self, now: float) -> float:
        """What is in it."""
        self._level = min(self.size, self._level + max(0.0, now - self._at) * self.rate)
        self._at = max(self._at, now)
        return self._level

    def take(self, amount: float, now: float) -> None:
        """Take so much out, whether it is there or not."""
        self._level = self.level(now) - amount

    def wait(self, amount: float, now: float) -> float:
        """Seconds until ``amount`` is in it; 0: it is."""
        return max(0.0, (amount - self.level(now)) / self.rate)


class Use:
    """What a key has used. ``now`` is in seconds of one clock that only goes forward."""

    def __init__(self, limits: Limits, now: float) -> None:
        self.limits = limits
        self.requests = None if limits.requests_per_minute is None else Bucket(limits.requests_per_minute, now)
        self.tokens = None if limits.tokens_per_minute is None else Bucket(limits.tokens_per_minute, now)
        self.open = 0

    def enter(self, now: float) -> None:
        """A request begins. Raises ApiError 429 where a limit is reached; then nothing is counted."""
        most = self.limits.concurrent
        if most is not None and self.open >= most:
            self._refuse(f"this key may have {most} requests at one time, and has; wait for one to end", 1, now)
        if self.requests is not None and (wait := self.requests.wait(1, now)):
            self._refuse(f"this key may make {self.requests.size:g} requests a minute; try later", wait, now)
        if self.tokens is not None and (wait := self.tokens.wait(1, now)):
            self._refuse(f"this key may use {self.tokens.size:g} tokens a minute, and has; try later", wait, now)
        if self.requests is not None:
            self.requests.take(1, now)
        self.open += 1

    def leave(self, tokens: int, now: float) -> None:
        """A request ends that used so many tokens, of prompts and answers."""
        self.open -= 1
        if self.tokens is not None:
            self.tokens.take(tokens, now)

    def headers(self, now: float) -> Headers:
        """What an answer says of the limits, under OpenAI's names."""
        found: list[tuple[bytes, bytes]] = []
        for name, bucket in ((b"requests", self.requests), (b"tokens", self.tokens)):
            if bucket is not None:
                left, reset = max(0, int(bucket.level(now))), bucket.wait(bucket.size, now)
                found.append((b"x-ratelimit-limit-" + name, b"%d" % bucket.size))
                found.append((b"x-ratelimit-remaining-" + name, b"%d" % left))
                found.append((b"x-ratelimit-reset-" + name, b"%.3fs" % reset))
        return found

    def _refuse(self, message: str, wait: float, now: float) -> None:
        headers = [*retry_headers(wait), *self.headers(now)]
        raise ApiError(429, message, code="rate_limit_exceeded", headers=headers)
