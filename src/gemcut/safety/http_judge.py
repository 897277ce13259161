"""A judge behind an address: an operator's own service.

It is sent ``{"text", "policies", "prompt"}`` by POST and answers ``{"scores": {policy: number from 0 to 1}}``.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.parse
from collections.abc import Sequence

from gemcut.errors import ParameterError
from gemcut.safety.judge import JudgeError, check_policy

_MOST = 1 << 20  # bytes of an answer


class HttpJudge:
    """Asks an address; every question has to be answered within ``timeout`` seconds."""

    def __init__(self, url: str, policies: Sequence[str], *, timeout: float = 2.0, key: str = "") -> None:
        """``key`` goes into the header Authorization. Raises ParameterError for what is no address."""
        parts = urllib.parse.urlsplit(url)
        try:
            self._port = parts.port
        except ValueError:
            raise ParameterError(f"the judge's address {url!r} has no port from 1 to 65535") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
            raise ParameterError(
                f"the judge's address is {url!r}; expected http:// or https:// and a host, no password"
            )
        if not policies:
            raise ParameterError("a judge of kind http needs policies = [...], the names that it scores")
        self.policies = tuple(policies)
        self._host, self._secure, self._timeout, self._key = parts.hostname, parts.scheme == "https", timeout, key
        self._path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")

    def score(self, text: str, policy: str) -> float:
        """See ``Judge``."""
        return self.score_all(text, [policy])[policy]

    def score_all(self, text: str, policies: Sequence[str], prompt: str | None = None) -> dict[str, float]:
        """See ``ExchangeJudge``. Raises JudgeError that says what the address did."""
        for policy in policies:
            check_policy(policy, self.policies)
        body = json.dumps({"text": text, "policies": list(policies), "prompt": prompt}).encode()
        headers = {"content-type": "application/json", "accept": "application/json"}
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        until = time.monotonic() + self._timeout
        connection = kind(self._host, self._port, timeout=self._timeout)
        try:
            connection.request("POST", self._path, body, headers)
            response = connection.getresponse()
            data = self._read(response, until)
            if response.status != 200:
                raise JudgeError(f"the judge at {self._host} answered {response.status}; expected 200 and scores")
        except TimeoutError:
            raise JudgeError(f"the judge at {self._host} did not answer within {self._timeout:g} seconds") from None
        except (OSError, http.client.HTTPException) as error:
            raise JudgeError(f"the judge at {self._host} cannot be asked: {type(error).__name__}") from None
        finally:
            connection.close()
        try:
            scores = json.loads(data)["scores"]
            return {policy: scores[policy] for policy in policies}
        except (ValueError, KeyError, TypeError, RecursionError):
            raise JudgeError(f"the judge at {self._host} answered without a score for each policy") from None

    def _read(self, response: http.client.HTTPResponse, until: float) -> bytes:
        """The whole body. A socket's own timeout is for one read: an answer byte by byte would never end."""
        data = b""
        while piece := response.read1(65536):
            data += piece
            if time.monotonic() > until:
                raise TimeoutError
            if len(data) > _MOST:
                raise JudgeError(f"the judge at {self._host} answered with more than {_MOST >> 20} MiB")
        return data
