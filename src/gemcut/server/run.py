"""Run the server in this process: open the port at once, load the model beside it, end in order."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import uvicorn

from gemcut.errors import GemcutError, ParameterError
from gemcut.gemma import Gemma
from gemcut.progress import Report
from gemcut.server.app import App
from gemcut.server.protocol import Protocol
from gemcut.server.state import ServerState

_BACKLOG = 1024


def open_port(host: str, port: int) -> socket.socket:
    """A socket that listens at an address. Port 0 takes a free one.

    Raises ParameterError where the address is none of this machine's, or in use.
    """
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as error:
        reason = error.strerror if isinstance(error, socket.gaierror) else "it is no host name"
        raise ParameterError(f"--host {host!r} is no address: {reason}; try 127.0.0.1") from None
    listener = socket.socket(family, kind, number)
    try:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ParameterError(
                f"port {port} of {host} is in use by another program; choose another with --port (0 takes a free one)"
            ) from None
        if error.errno == errno.EACCES:
            raise ParameterError(f"port {port} needs more rights than this user has; take one from 1024 on") from None
        reason = error.strerror or str(error)
        raise ParameterError(f"cannot listen at {host}, port {port}: {reason}; try --host 127.0.0.1") from None
    return listener


def check_certificate(certificate: Path, key: Path | None) -> None:
    """Raise ParameterError where TLS could not be spoken with these files."""
    for name, path in (("--ssl-certfile", certificate), ("--ssl-keyfile", key)):
        if path is not None and not path.is_file():
            raise ParameterError(f"{name} {path}: there is no such file")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=_no_password)
    except (ssl.SSLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or str(error)
        raise ParameterError(
            f"--ssl-certfile {certificate} and its key cannot be used: {reason}; expected a certificate and its "
            "unencrypted private key in PEM form"
        ) from None


def _no_password() -> str:
    raise ValueError("the key is encrypted")


def config_of(app: App, *, certificate: Path | None = None, key: Path | None = None) -> uvicorn.Config:
    """How uvicorn is to run our application."""
    return uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        interface="asgi3",
        lifespan="off",
        log_config=None,
        log_level="critical",  # what happens is said by the application itself
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=int(app.state.settings.keep_alive),
        timeout_graceful_shutdown=5,
        ssl_certfile=certificate,
        ssl_keyfile=key,
    )


class Server(uvicorn.Server):
    """uvicorn's server, which loads the model while it serves, and drains before it ends.

    Attributes:
        failure: why the model could not be loaded.
        signals: those that asked it to end.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        state: ServerState,
        load: Callable[[Report], Gemma] | None = None,
        ready: Callable[[ServerState], None] | None = None,
        opened: Callable[[], None] | None = None,
    ) -> None:
        """``opened`` is called once signals and requests are taken; then ``load`` in a thread; then ``ready`` in the
        server's, once requests are answered."""
        super().__init__(config)
        self.state = state
        self._load, self._ready, self._opened = load, ready, opened
        self.failure: BaseException | None = None
        self.signals: list[int] = []
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drained_by: float | None = None

    @property
    def loading(self) -> bool:
        """Whether the model's thread is still at work."""
        return self._thread is not None and self._thread.is_alive()

    def join(self) -> None:
        """Wait for the model's thread, which has failed: it still frees what it had loaded."""
        if self._thread is not None:
            self._thread.join()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        if self._opened is not None:
            self._opened()
        if self._load is not None:
            self.state.stage = "loading"
            self._thread = threading.Thread(target=self._load_model, name="gemcut-load", daemon=True)
            self._thread.start()

    def _load_model(self) -> None:
        """The thread that loads."""
        assert self._load is not None
        assert self._loop is not None
        try:
            gemma = self._load(self._report)
            # These hold Python's lock for seconds, so that no answer may be under way.
            with contextlib.suppress(GemcutError):  # and one that needs a tokenizer
                gemma.tokenizer.prepare()
            with contextlib.suppress(GemcutError):  # a request that asks for a grammar is told why there is none
                gemma.grammars.prepare()
            import torch

            threads = torch.get_num_threads()
        except BaseException as error:
            self._loop.call_soon_threadsafe(self._fail, error)
        else:
            self._loop.call_soon_threadsafe(self._loaded, gemma, threads)

    def _report(self, done: int, total: int) -> None:
        self.state.done, self.state.total = done, total

    def _fail(self, error: BaseException) -> None:
        self.failure, self.should_exit = error, True

    def _loaded(self, gemma: Gemma, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)  # PyTorch counts them per thread, and the engine takes the number from here
        self.state.gemma, self.state.stage = gemma, "ready"
        if self._ready is not None:
            self._ready(self.state)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGTERM and Ctrl-C: finish what is under way. The second one ends the process at once."""
        if self.signals:
            os._exit(128 + sig)
        self.signals.append(sig)
        self.state.draining = True

    async def on_tick(self, counter: int) -> bool:
        if self.signals:
            self._drain()
        return await super().on_tick(counter)

    def _drain(self) -> None:
        now = asyncio.get_running_loop().time()
        if self._drained_by is None:
            self._drained_by = now + self.state.settings.drain_timeout
        if not self.server_state.tasks:
            self.should_exit = True
        elif now >= self._drained_by:
            self.state.cancel_all()
            self.should_exit = True


def serve(
    state: ServerState,
    load: Callable[[Report], Gemma],
    listener: socket.socket,
    *,
    certificate: Path | None = None,
    key: Path | None = None,
    ready: Callable[[ServerState], None] | None = None,
    opened: Callable[[], None] | None = None,
) -> int:
    """Serve until a signal comes; returns it. Raises what kept the model from being loaded."""
    server = Server(config_of(App(state), certificate=certificate, key=key), state, load, ready, opened)
    server.run(sockets=[listener])
    if server.failure is not None:
        server.join()
        raise server.failure
    number = server.signals[0] if server.signals else signal.SIGTERM
    if server.loading:
        # Its thread may be inside PyTorch, which an interpreter that goes away would take down with it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0 if number == signal.SIGTERM else 128 + number)
    return number
