"""``gemcut serve``: OpenAI's API over HTTP."""

from __future__ import annotations

import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import gemcut
from gemcut.cli.access_options import AccessOptions
from gemcut.cli.generate import read_mark
from gemcut.cli.options import (
    MODEL_HELP,
    Debug,
    LoadOptions,
    SamplingOptions,
    WatermarkKey,
    flag,
    need_model,
    option,
    with_options,
)
from gemcut.errors import ParameterError, UnsupportedError
from gemcut.progress import LoadProgress, Report
from gemcut.settings import read_settings

if TYPE_CHECKING:
    from gemcut.gemma import Gemma
    from gemcut.server.state import ServerState


@with_options
def serve(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP)] = None,
    *,
    served_model_name: Annotated[
        list[str] | None, option("What clients call the model; repeatable. Else MODEL.", metavar="NAME")
    ] = None,
    ssl_certfile: Annotated[Path | None, option("Speak HTTPS with this certificate (PEM).", metavar="PATH")] = None,
    ssl_keyfile: Annotated[Path | None, option("Its private key, where that is another file.", metavar="PATH")] = None,
    max_requests: Annotated[
        int | None, option("Most answers computed or waiting; one more gets 503. Else 512.", metavar="N")
    ] = None,
    queue_timeout: Annotated[
        float | None, option("An answer that is not begun by then gets 503. Else 120.", metavar="SECONDS")
    ] = None,
    request_timeout: Annotated[
        float | None, option("An answer that is not whole by then gets 503. Else 3600.", metavar="SECONDS")
    ] = None,
    drain_timeout: Annotated[
        float | None, option("What answers under way have left after SIGTERM. Else 30.", metavar="SECONDS")
    ] = None,
    step_seconds: Annotated[
        float | None,
        option(
            "How long a step may take in which answers wait for a token: prompts beside them are cut. 0: as long as it "
            "takes. Else 0.5 on a CPU, 0 on a GPU.",
            metavar="SECONDS",
        ),
    ] = None,
    guard: Annotated[
        Path | None, option("A guard file: judges that look at prompts and answers.", "--guard", metavar="FILE")
    ] = None,
    audit_log: Annotated[
        Path | None,
        option("Where decisions of the guard and reports of misuse are written down.", "--audit-log", metavar="FILE"),
    ] = None,
    pii: Annotated[
        str | None,
        option("What becomes of personal data in prompts, answers and logs: redact, refuse, report.", metavar="MODE"),
    ] = None,
    watermark_key: WatermarkKey = None,
    allow_unknown: Annotated[bool, flag("Ignore unknown fields of requests, and say so.", "--allow-unknown")] = False,
    debug: Debug = False,
    access: AccessOptions,
    sampling: SamplingOptions,
    load: LoadOptions,
) -> None:
    """Serve a model to OpenAI's clients, at http://127.0.0.1:8000/v1.

    Example: [cyan]gemcut serve gemma-3-270m[/]

    The port is open at once; requests get 503 until the model is loaded.
    SIGTERM and Ctrl-C finish the answers under way; a second one ends at once.
    Sampling options are defaults, which a request may change.
    """
    name = need_model(model, "gemcut serve MODEL")
    chosen = read_settings()
    host, port = access.address(chosen)
    if ssl_keyfile is not None and ssl_certfile is None:
        raise ParameterError("--ssl-keyfile needs --ssl-certfile, the certificate that belongs to it")
    try:
        import httptools  # noqa: F401
        import msgspec  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(
            f"gemcut serve needs {error.name}: pip install 'gemcut[serve]' (in the clone: pip install -e '.[serve]')"
        ) from None
    if step_seconds is not None and not 0 <= step_seconds <= 3600:
        raise ParameterError(f"--step-seconds is {step_seconds:g}; expected seconds from 0 to 3600")
    fields, levels = sampling.fields(), sampling.levels()
    from gemcut.server import run
    from gemcut.server.state import ServerSettings, ServerState

    if ssl_certfile is not None:
        run.check_certificate(ssl_certfile, ssl_keyfile)
    settings = ServerSettings(
        names=tuple(served_model_name or [_called(name)]),
        max_requests=chosen.value("max_requests", max_requests),
        queue_timeout=float(chosen.value("queue_timeout", queue_timeout)),
        request_timeout=float(chosen.value("request_timeout", request_timeout)),
        drain_timeout=float(chosen.value("drain_timeout", drain_timeout)),
        allow_unknown=allow_unknown,
    )
    guard_file = None
    if guard is not None:
        from gemcut.safety.guard_file import GuardFile

        guard_file = GuardFile.read(guard)
    state = ServerState(settings, watermark=read_mark(watermark_key).get("watermark"))
    if pii is not None:
        from gemcut.server.private import PiiDoor

        state.pii = PiiDoor(pii)
    if audit_log is not None:
        from gemcut.safety.audit import AuditLog
        from gemcut.server.audit import Audit

        state.audit = Audit(AuditLog(audit_log))
    access.apply(state, chosen)
    listener = run.open_port(host, port)
    scheme = "http" if ssl_certfile is None else "https"
    address = f"{scheme}://{_shown(listener)}"
    greeting = f"gemcut {gemcut.__version__} listens at {address} and loads {name}"

    speeds: list[float] = []

    def load_model(report: Report) -> Gemma:
        with LoadProgress(True, f"loading {name}") as bar:

            def tell(done: int, total: int) -> None:
                report(done, total)
                if bar is not None:
                    bar(done, total)

            gemma = load.load(name, progress=tell, step_seconds="auto" if step_seconds is None else step_seconds)
        gemma.sampling_levels[:0] = [("command line", fields), *levels]
        if guard_file is not None:
            from gemcut.server.guards import JudgeDoor

            state.judges = JudgeDoor(guard_file.build(gemma))
        speeds.append(measured_speed(gemma))
        return gemma

    number = run.serve(
        state,
        load_model,
        listener,
        certificate=ssl_certfile,
        key=ssl_keyfile,
        opened=lambda: print(greeting, file=sys.stderr, flush=True),
        ready=lambda state: print(banner(state, address, speeds[0], access), file=sys.stderr, flush=True),
    )
    if state.judges is not None:
        print(state.judges.words(), file=sys.stderr, flush=True)
    if state.audit is not None:
        state.audit.close()
    if number == signal.SIGINT:
        raise typer.Exit(128 + number)


def measured_speed(gemma: Gemma) -> float:
    """Tokens a second of one answer, by a few tokens of one. The first of them, which prepare much, are not counted."""
    from gemcut.engine import SamplingParams

    params = SamplingParams(max_new_tokens=min(8, gemma.engine.max_context - 1), temperature=0, ignore_eos=True)
    gemma.complete([gemma.bos_id], params)
    (result,) = gemma.complete([gemma.bos_id], params)
    return result.checked().stats.decode_tokens_per_second


def banner(state: ServerState, address: str, speed: float, access: AccessOptions) -> str:
    """What is served, where, with what, at what speed, and to whom: a few lines."""
    gemma = state.gemma
    assert gemma is not None
    dtype = str(gemma.dtype).removeprefix("torch.")
    spec = gemma.model.quantization
    kind = dtype if spec is None else f"{dtype}, {spec.format}"
    sampling = gemma.resolve_sampling(0, {}, chat=True).words()
    return (
        f"ready: {', '.join(state.settings.names)} at {address}/v1 (loaded in {gemma.load_seconds:.1f} s)\n"
        f"  device {gemma.device}, dtype {kind}, context {gemma.engine.max_context}, "
        f"{gemma.engine.config.max_batch_size} rows a step, about {speed:,.0f} tok/s for one answer\n"
        f"  sampling where a request says nothing: {sampling}\n"
        f"  {access.words(state)}{_guarded(state)}"
    )


def _guarded(state: ServerState) -> str:
    if state.judges is None:
        return ""
    file = state.judges.judges.file
    return (
        f"\n  guard: mode {file.mode}, prompts by {', '.join(file.input) or 'nothing'}, "
        f"answers by {', '.join(file.output) or 'nothing'}"
    )


def _called(name: str) -> str:
    """What clients call a model that was named so: a path's last part."""
    path = Path(name)
    return path.resolve().name if path.exists() else name


def _shown(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
