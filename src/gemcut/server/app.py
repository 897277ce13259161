"""App: the ASGI application. A request's way: gates (hosts, keys, limits) -> route -> handler -> answer or error."""

from __future__ import annotations

import asyncio
import importlib
import pkgutil
from collections.abc import Awaitable, Callable
from functools import cache, partial

import gemcut
import gemcut.server
from gemcut.server.asgi import ClientLeftError, RawSend, Receive, Request, Scope, Send, respond_error, respond_json
from gemcut.server.errors import ApiError, api_error, unavailable
from gemcut.server.private import without
from gemcut.server.state import ServerState

Handler = Callable[[ServerState, Request, Send], Awaitable[None]]
Routes = dict[tuple[str, str], Handler]

#: Status, in metrics and logs alone, of a request whose client left before it had its answer.
CLIENT_LEFT = 499


async def _health(state: ServerState, request: Request, send: Send) -> None:
    status, body = state.readiness()
    await respond_json(send, body, status, [] if status == 200 else [(b"retry-after", b"1")])


async def _live(state: ServerState, request: Request, send: Send) -> None:
    await respond_json(send, state.health())


async def _version(state: ServerState, request: Request, send: Send) -> None:
    await respond_json(send, {"version": gemcut.__version__})


async def _preflight(state: ServerState, request: Request, send: Send) -> None:
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send.raw({"type": "http.response.body", "body": b""})


def _texts(state: ServerState, request: Request) -> dict[str, list[str]]:
    """Prompts and answers, for logs that were asked to hold them."""
    if state.gemma is None or not request.sequences:
        return {}
    tokenizer = state.gemma.tokenizer
    prompts = [tokenizer.decode(each.request.prompt_ids, skip_special_tokens=False) for each in request.sequences]
    answers = ["".join(event.text for event in each.events) for each in request.sequences]
    if state.pii is not None:
        prompts, answers = without(prompts), without(answers)
    return {"prompts": prompts, "texts": answers}


#: This module's part of the routes. A path that ends in ``/*`` stands for all that begin so.
ROUTES: Routes = {
    ("GET", "/health"): _health,
    ("GET", "/ready"): _health,
    ("GET", "/live"): _live,
    ("GET", "/version"): _version,
}


@cache
def all_routes() -> Routes:
    """The routes of this room: what its modules have as ``ROUTES``."""
    found: Routes = {}
    for module in sorted(info.name for info in pkgutil.iter_modules(gemcut.server.__path__)):
        found |= getattr(importlib.import_module(f"gemcut.server.{module}"), "ROUTES", {})
    return found


class App:
    """The server as an ASGI application, for uvicorn or any other ASGI server."""

    def __init__(self, state: ServerState) -> None:
        self.state = state
        self.routes = all_routes()
        self._open = {path[:-1]: path for _, path in self.routes if path.endswith("/*")}
        self._paths = {path for _, path in self.routes}

    async def __call__(self, scope: Scope, receive: Receive, send: RawSend) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        else:
            raise RuntimeError(f"gemcut's server speaks HTTP, not {scope['type']}")

    async def _http(self, scope: Scope, receive: Receive, raw: RawSend) -> None:
        request = Request(scope, receive)
        send = Send(raw, scope, request.reply)
        path = self._path(request.path)
        state = self.state
        state.metrics.request_started(path)
        entered = 0
        try:
            for gate in state.gates:
                await gate.enter(state, request)
                entered += 1
            await (_preflight if request.preflight else self._handler(request, path))(state, request, send)
        except ClientLeftError:
            send.status = CLIENT_LEFT
        except asyncio.CancelledError:
            if send.status is None:
                await respond_error(send, unavailable("the server is shutting down", code="draining"))
            raise
        except Exception as error:
            await self._fail(request, send, error)
        finally:
            for gate in state.gates[:entered]:
                gate.leave(state, request)
            failure: ApiError | None = request.notes.get("failure")
            word = None if failure is None else failure.code or failure.type
            # Before any gate's end or a place among the answers: nothing was done for it.
            at_door = failure is not None and not request.sequences and failure.status in (401, 403, 429, 503)
            status = send.status or 500
            state.metrics.request_finished(path, status, word, at_door=at_door)
            if state.audit is not None:
                state.audit.request(state, request, status, word)
            state.log.request(request, status, error=word, texts=partial(_texts, state, request))

    def _path(self, path: str) -> str:
        """The path of the route that a path belongs to; "other" where there is none."""
        if path in self._paths:
            return path
        return next((whole for start, whole in self._open.items() if path.startswith(start)), "other")

    def _handler(self, request: Request, path: str) -> Handler:
        method = "GET" if request.method == "HEAD" else request.method
        handler = self.routes.get((method, path))
        if handler is not None:
            if request.path.startswith("/v1/"):
                self.state.model()  # 503 while it is loaded, whatever is asked for
            return handler
        shown = request.path[:100]
        allowed = sorted(method for method, known in self.routes if known == path)
        if allowed:
            raise ApiError(
                405,
                f"{request.method} {shown} is not possible; use {' or '.join(allowed)}",
                code="method_not_allowed",
                headers=[(b"allow", ", ".join(allowed).encode())],
            )
        raise ApiError(404, f"there is nothing at {shown!r}; the API begins at /v1", code="not_found")

    async def _fail(self, request: Request, send: Send, error: Exception) -> None:
        answer = request.notes["failure"] = api_error(error, request_id=request.id)
        if answer.status == 500:
            self.state.log.failure(request, error)
        if send.status is not None:  # the head is out: nothing can be said any more, so the connection is cut
            raise error
        await respond_error(send, answer)

    async def _lifespan(self, receive: Receive, send: RawSend) -> None:
        while True:
            message = await receive()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return
