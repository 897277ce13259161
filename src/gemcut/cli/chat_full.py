"""What chat does when the context is nearly full: it asks, drops, summarises or stops, and says so."""

from __future__ import annotations

from collections.abc import Callable

from gemcut.cli.conversation import Conversation
from gemcut.cli.interrupt import quiet_keyboard
from gemcut.gemma import Gemma
from gemcut.uses.room import Full, Turns, fewest, reserve, summarize_turns


def make_room(
    gemma: Gemma,
    conversation: Conversation,
    question: str,
    how: Full,
    *,
    most: int | None,
    ask: Callable[[str], str] | None,
    say: Callable[[str], None],
) -> None:
    """Shorten a conversation where it, a question and an answer would not fit; it stays whole where nobody chose to.

    Args:
        most: tokens that the answer may have at most; None: as many as there is room for.
        ask: gives a person's answer to a question of one line; None where there is nobody to ask, which is "stop".
        say: shows a line.

    Raises GemcutError where a summary cannot be made; the conversation is then as it was.
    """
    limit = gemma.engine.max_context
    room = limit - reserve(limit, most)

    def length(turns: Turns, summary: str = conversation.summary) -> int:
        own = Conversation(conversation.system, list(turns), conversation.examples, summary)
        return len(gemma.encode_messages(own.messages(question)))

    turns = conversation.turns
    if not turns or (used := length(turns)) <= room or how == "stop":
        return
    if how == "ask":
        how = _asked(ask, used, limit)
    if how == "stop":
        return
    # A summary takes room itself, and is not to be made again with every message.
    count = fewest(turns, length, room if how == "drop" else min(room - limit // 16, limit // 2))
    if count is None:
        count = fewest(turns, length, room)
    if not count:
        return
    what = "the oldest exchange" if count == 1 else f"the {count} oldest exchanges"
    if how == "drop":
        conversation.turns = turns[2 * count :]
        say(
            f"The context is nearly full ({used:,} of {limit:,} tokens): {what} dropped, the model no longer sees them."
        )
        return
    with quiet_keyboard():
        summary = summarize_turns(gemma, turns[: 2 * count], conversation.summary)
    conversation.turns, conversation.summary = turns[2 * count :], summary
    say(f"The context is nearly full ({used:,} of {limit:,} tokens): {what} replaced by this summary: {summary}")


def _asked(ask: Callable[[str], str] | None, used: int, limit: int) -> Full:
    if ask is None:
        return "stop"
    question = (
        f"The context is nearly full ({used:,} of {limit:,} tokens). Oldest exchanges: [d]rop, [s]ummarise, [k]eep?"
    )
    try:
        answer = ask(question).lower()
    except (EOFError, KeyboardInterrupt):
        return "stop"
    choices: dict[str, Full] = {"d": "drop", "drop": "drop", "s": "summarise", "summarise": "summarise"}
    return choices.get(answer, "stop")
