"""What a step's result means for a request: the event of its token, or the reason for which it ends."""

from __future__ import annotations

import torch

from gemcut.engine.edits import was_shortened
from gemcut.engine.request import FinishReason, RowError, Sequence, TokenEvent, TokenLogprob


def failure_of(error: Exception, tokens: int) -> RowError:
    """What to say of an exception of the network, which ran with ``tokens`` tokens of one request alone."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error):
        advice = "free some memory, or load the model with a smaller kv_memory or max_batch_tokens"
        return RowError(f"memory ran out while {tokens} tokens of this request were computed alone: {advice}", error)
    return RowError.of(error)


def event_of(sequence: Sequence, token: int, logprob: TokenLogprob | None) -> TokenEvent:
    """The event of a sampled token, which its text sink is given. The sequence itself is not changed."""
    request, sink = sequence.request, sequence.sink
    reason: FinishReason | None = None
    stop: int | str | None = None
    text = ""
    if token in request.stop_ids and not request.params.ignore_eos:
        reason, stop = "length" if was_shortened(sequence) else "stop", token
    else:
        text = sink.push(token) if sink is not None else ""
        if sink is not None and sink.stopped is not None:
            reason, stop = "stop", sink.stopped
        elif sequence.output_length + 1 >= request.params.max_new_tokens:
            reason = "length"
    if reason is not None and sink is not None and not isinstance(stop, str):
        text += sink.finish()
        if isinstance(sink.stopped, str):  # completed only by the text held back till now
            reason, stop = "stop", sink.stopped
    return TokenEvent(sequence.id, token, text, logprob, reason, stop)
