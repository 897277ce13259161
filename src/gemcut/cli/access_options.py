"""Who may use a server, and what it writes down: options of ``gemcut serve``."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemcut.errors import ParameterError
from gemcut.settings import Settings

if TYPE_CHECKING:
    from gemcut.server.keys import Keys
    from gemcut.server.state import ServerState

_access = functools.partial(typer.Option, rich_help_panel="Access", show_default=False)
_watch = functools.partial(typer.Option, rich_help_panel="Watching it", show_default=False)


@dataclass(frozen=True, kw_only=True)
class AccessOptions:
    """Keys, names, origins; logs and metrics."""

    host: Annotated[
        str | None, _access(metavar="ADDRESS", help="Where to listen. Else 127.0.0.1; others need API keys.")
    ] = None
    port: Annotated[int | None, _access(metavar="N", help="The port; 0 takes a free one. Else 8000.")] = None
    api_key_file: Annotated[
        Path | None, _access(metavar="FILE", help="TOML of API keys and their limits; nobody comes in without one.")
    ] = None
    allow_host: Annotated[
        list[str] | None, _access(metavar="NAME", help="A name that this server has, too; repeatable.")
    ] = None
    allow_origin: Annotated[
        list[str] | None, _access(metavar="ORIGIN", help="An origin whose pages may use it, or *; repeatable.")
    ] = None
    share_prefix_cache: Annotated[
        bool,
        _access("--share-prefix-cache", metavar="", help="What prompts of all keys share is computed once for all."),
    ] = False
    log_prompts: Annotated[
        bool, _watch("--log-prompts", metavar="", help="Write prompts and answers into the log, too.")
    ] = False
    metrics_alias: Annotated[
        list[str] | None, _watch(metavar="NAME", help="Give metrics under these names, too: vllm.")
    ] = None

    def address(self, found: Settings) -> tuple[str, int]:
        """Where to listen. Raises ParameterError."""
        return str(found.value("host", self.host)), int(found.value("port", self.port))

    def keys(self, found: Settings) -> Keys | None:
        """The API keys, if there is a file of them. Raises ParameterError."""
        from gemcut.server.keys import read_keys

        path = self.api_key_file or found.value("api_key_file")
        return None if path is None else read_keys(path)

    def apply(self, state: ServerState, found: Settings) -> None:
        """Set a server's gates, log and metrics up.

        Raises ParameterError, also where its address can be reached by others and there are no keys.
        """
        from gemcut.server.auth import HostGate, KeyGate, check_address
        from gemcut.server.logs import Log
        from gemcut.server.metrics import ALIASES

        host, _ = self.address(found)
        keys = self.keys(found)
        if self.share_prefix_cache and keys is None:
            raise ParameterError("--share-prefix-cache needs --api-key-file: without keys all share it")
        for alias in self.metrics_alias or ():
            if alias not in ALIASES:
                raise ParameterError(f"--metrics-alias is {alias[:80]!r}; expected {' or '.join(ALIASES)}")
        hosts = self.allow_host or found.value("allow_host") or ()
        origins = self.allow_origin or found.value("allow_origin") or ()
        own = check_address(host, keys)
        state.gates = [
            HostGate(loopback=own, host=host, hosts=hosts, origins=origins),
            KeyGate(keys, share_cache=self.share_prefix_cache),
            *state.gates,
        ]
        state.aliases = tuple(self.metrics_alias or ())
        state.log = Log(prompts=self.log_prompts)

    def words(self, state: ServerState) -> str:
        """A line for the banner: who may come in."""
        gate: Any = next(gate for gate in state.gates if hasattr(gate, "keys"))
        who = "no API key needed" if not gate.keys else f"API keys: {', '.join(key.name for key in gate.keys.keys)}"
        return who if len(who) <= 100 else f"{len(gate.keys)} API keys"
