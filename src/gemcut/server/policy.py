"""/v1/policy: what a model may not be used for, and what it cannot do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemcut.safety.policies import builtin_policies
from gemcut.server.asgi import Request, Send, respond_json

if TYPE_CHECKING:
    from gemcut.server.app import Routes
    from gemcut.server.state import ServerState

PROHIBITED_USE = "https://ai.google.dev/gemma/prohibited_use_policy"
#: The card's limitations, in our words.
LIMITATIONS = (
    "What its training data lacks or is biased in, its answers lack or are biased in, too.",
    "It does better at tasks with a clear prompt and enough context than at open or very complex ones.",
    "It may miss subtle meanings, sarcasm and figures of speech.",
    "It is no knowledge base: statements may be wrong or out of date.",
    "It relies on patterns of language, and may lack common sense.",
)


async def policy(state: ServerState, request: Request, send: Send) -> None:
    """Name the Prohibited Use Policy, the parts of it that guards know, and the model card's limitations."""
    parts = sorted({each.heading for each in builtin_policies().values() if each.heading})
    found = {"object": "policy", "prohibited_use_policy": PROHIBITED_USE, "headings": parts}
    await respond_json(send, found | {"limitations": list(LIMITATIONS), "reports": state.audit is not None})


#: This module's part of the routes.
ROUTES: Routes = {("GET", "/v1/policy"): policy}
