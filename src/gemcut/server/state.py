"""ServerState: what all requests share. ServerSettings: what the operator chose."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import msgspec

import gemcut
from gemcut.server.asgi import Request
from gemcut.server.audit import Audit
from gemcut.server.delivery import Delivery
from gemcut.server.errors import ApiError, unavailable
from gemcut.server.fields import decode
from gemcut.server.guards import Guard, JudgeDoor
from gemcut.server.logs import Log
from gemcut.server.metrics import Metrics
from gemcut.server.private import PiiDoor

if TYPE_CHECKING:
    from collections.abc import Callable

    from gemcut.engine.sampling import SamplingParams
    from gemcut.gemma import Gemma
    from gemcut.safety.watermark import Watermark

Body = TypeVar("Body", bound=msgspec.Struct)
Result = TypeVar("Result")

#: Texts of more characters are tokenized in a thread: they would keep the others waiting for milliseconds.
_LARGE = 8192


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """What the operator chose. Seconds, bytes, counts.

    Attributes:
        names: what clients may call the model; the first is its id in answers.
        max_body: most bytes of a request's body.
        header_timeout, body_timeout: seconds in which a request's head, and its body, must have come.
        send_timeout: a connection whose client reads nothing for so long is cut.
        keep_alive: seconds after which a connection without a request is closed.
        ping: seconds of silence after which a stream gets a comment.
        max_requests: most answers that are computed or wait at one time; one more gets 503.
        queue_timeout: an answer that has not begun by then gets 503.
        request_timeout: an answer that is not whole by then ends with 503.
        drain_timeout: seconds that answers under way have left after SIGTERM.
        allow_unknown: leave unknown fields out, and say so in a header, instead of refusing them.
    """

    names: tuple[str, ...] = ("gemma",)
    max_body: int = 8 << 20
    header_timeout: float = 10.0
    body_timeout: float = 30.0
    send_timeout: float = 60.0
    keep_alive: float = 30.0
    ping: float = 5.0
    max_requests: int = 512
    queue_timeout: float = 120.0
    request_timeout: float = 3600.0
    drain_timeout: float = 30.0
    allow_unknown: bool = False


class Gate(Protocol):
    """Stands before the routes: hosts and origins, keys, limits."""

    async def enter(self, state: ServerState, request: Request) -> None:
        """Let a request in, or raise ApiError. What it enters it will leave."""

    def leave(self, state: ServerState, request: Request) -> None:
        """The request that was let in has its answer."""


@dataclass(eq=False)
class ServerState:
    """What all requests share.

    Attributes:
        gemma: the model; None while it is loaded.
        stage, done, total: how far the loading is ("starting", "loading", then "ready"), in bytes.
        draining: the server ends: what is under way is finished, nothing new is begun.
        gates: asked in this order before a route's handler runs.
        guards: asked about prompts and answers.
        judges: the guard file's judges, asked too; None where there is no guard file.
        audit: where decisions and reports are written down; None: nowhere.
        pii: what becomes of personal data; None: nothing looks for it.
        watermark: marks all that is drawn; None: no mark.
        rows: answers that are computed or wait.
        log: where lines about requests go.
        aliases: whose names for metrics are given beside gemcut's own.
    """

    settings: ServerSettings = field(default_factory=ServerSettings)
    gemma: Gemma | None = None
    stage: str = "starting"
    done: int = 0
    total: int = 0
    draining: bool = False
    gates: list[Gate] = field(default_factory=list)
    guards: Sequence[Guard] = ()
    judges: JudgeDoor | None = None
    audit: Audit | None = None
    pii: PiiDoor | None = None
    watermark: Watermark | None = None
    metrics: Metrics = field(default_factory=Metrics)
    log: Log = field(default_factory=Log)
    aliases: tuple[str, ...] = ()
    created: int = field(default_factory=lambda: int(time.time()))
    rows: int = 0

    def __post_init__(self) -> None:
        #: Samplings of requests, by what they say; see `answers.resolve`.
        self.resolved: dict[object, SamplingParams] = {}
        self._delivery: Delivery | None = None
        self._fingerprint: tuple[Gemma | None, str] = (None, f"gemcut-{gemcut.__version__}")
        self._config_hash: tuple[Gemma | None, str] = (None, "")
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="encoder")
        self._encoding = 0

    @property
    def name(self) -> str:
        """The model's id in answers."""
        return self.settings.names[0]

    @property
    def config_hash(self) -> str:
        """A hash of what the model is: its configuration, quantization and dtype, and its revision."""
        if self._config_hash[0] is not self.gemma:
            assert self.gemma is not None
            self._config_hash = self.gemma, self.gemma.config_hash
        return self._config_hash[1]

    @property
    def fingerprint(self) -> str:
        """What computes: gemcut's version, the kind of device, the dtype. Answers with others may differ."""
        if self._fingerprint[0] is not self.gemma:
            assert self.gemma is not None
            dtype = str(self.gemma.dtype).removeprefix("torch.")
            words = f"gemcut-{gemcut.__version__}-{self.gemma.device.type}-{dtype}"
            self._fingerprint = self.gemma, words
        return self._fingerprint[1]

    def model(self, name: str | None = None) -> Gemma:
        """The model, which a request may have named.

        Raises ApiError: 503 while it is loaded or the server ends, 404 where it has another name.
        """
        if self.draining:
            raise unavailable("the server is shutting down", retry_after=5, code="draining")
        if self.gemma is None:
            raise unavailable("the model is still being loaded", code="loading")
        if name is not None and name not in self.settings.names:
            raise ApiError(
                404,
                f"there is no model {name[:100]!r} here; this server has {', '.join(self.settings.names)}",
                param="model",
                code="model_not_found",
            )
        if self.judges is None and self.gemma.guard is not None:  # it was loaded with one
            self.judges = JudgeDoor(self.gemma.guard)
        return self.gemma

    @property
    def delivery(self) -> Delivery:
        """What brings the engine's events to this event loop."""
        if self._delivery is None or self._delivery.loop is not asyncio.get_running_loop():
            assert self.gemma is not None
            self._delivery = Delivery(self.metrics.step)
            self.gemma.loop.listen(self._delivery.step)
        return self._delivery

    async def read(self, request: Request, kind: type[Body]) -> Body:
        """A request's body, as ``kind``. Raises ApiError that names what is wrong."""
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type != "application/json":
            raise ApiError(
                415,
                f"the content type is {content_type[:100]!r}; expected application/json",
                code="unsupported_media_type",
            )
        body = await request.body(self.settings.max_body)
        found, ignored = decode(body, kind, allow_unknown=self.settings.allow_unknown)
        if ignored:
            request.notes["ignored"] = ignored
        return found

    async def encode(self, size: int, work: Callable[[], Result]) -> Result:
        """Run ``work``, which tokenizes about ``size`` characters: large ones in a thread, so that nobody waits.

        There is one such thread, as the tokenizer does one text at a time; who comes meanwhile waits for it there.
        """
        if size <= _LARGE and not self._encoding:
            return work()
        self._encoding += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._encoder, work)
        finally:
            self._encoding -= 1

    def admit(self, count: int) -> None:
        """Make room for ``count`` more answers; `release` gives it back. Raises ApiError 503 where there is none."""
        if count > self.settings.max_requests:
            raise ApiError(400, f"{count} answers are asked for at once; {self.settings.max_requests} is the most")
        if self.rows + count > self.settings.max_requests:
            raise unavailable(
                f"{self.rows} answers are under way or waiting, {self.settings.max_requests} is the most",
                retry_after=2,
                code="overloaded",
            )
        self.rows += count

    def release(self, count: int) -> None:
        """Give back what `admit` gave."""
        self.rows -= count

    def cancel_all(self) -> None:
        """End all answers, whose clients are told."""
        if self._delivery is not None:
            self._delivery.cancel_all()

    def readiness(self) -> tuple[int, dict[str, Any]]:
        """(status, body) of /ready."""
        if self.draining:
            return 503, {"status": "draining"}
        if self.gemma is None:
            return 503, {"status": "loading", "stage": self.stage, "done": self.done, "total": self.total}
        return 200, {"status": "ready"}

    def health(self) -> dict[str, Any]:
        """The body of /live."""
        return {"status": "ok", "pid": os.getpid()}
