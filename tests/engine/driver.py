"""What the engine's tests share: tiny models and their transformers twins, a recording engine, invariants."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Sequence as Many
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gemcut.cache_blocks import sliding_blocks_needed
from gemcut.config import GemmaConfig
from gemcut.engine import Engine, EngineConfig, Request, SamplingParams, TokenEvent
from gemcut.engine.blocks import BlockPool, block_key
from gemcut.engine.request import Sequence
from gemcut.model import Model
from gemcut.model.dense import dense_logits
from support import TINY, hf_model, tiny_config

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0, max_new_tokens=12)


def greedy(new: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_new_tokens=new)


def fill(model: Model, state: dict[str, Tensor]) -> Model:
    """Copy a transformers state dict into our model (independent of the checkpoint room's readers)."""
    own = dict(model.named_parameters())

    def put(name: str, tensor: Tensor) -> None:
        own[name].data.copy_(tensor)

    put("embed.weight", state["model.embed_tokens.weight"])
    put("norm.scale", 1 + state["model.norm.weight"].float())
    for i in range(model.config.num_hidden_layers):
        theirs, ours = f"model.layers.{i}.", f"layers.{i}."
        put(ours + "attention.qkv_proj.weight", torch.cat([state[f"{theirs}self_attn.{x}_proj.weight"] for x in "qkv"]))
        put(ours + "attention.o_proj.weight", state[theirs + "self_attn.o_proj.weight"])
        put(
            ours + "mlp.gate_up_proj.weight", torch.cat([state[f"{theirs}mlp.{x}_proj.weight"] for x in ("gate", "up")])
        )
        put(ours + "mlp.down_proj.weight", state[theirs + "mlp.down_proj.weight"])
        for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            norm = f"{name}_layernorm"
            put(f"{ours}{name}_norm.scale", 1 + state[f"{theirs}{norm}.weight"].float())
        if model.config.qk_norm:
            for x in "qk":
                put(f"{ours}attention.{x}_norm.scale", 1 + state[f"{theirs}self_attn.{x}_norm.weight"].float())
    return model


@cache
def twins(model_type: str = "gemma2", dtype: torch.dtype = torch.float32, window: int = 4) -> tuple[Model, Any]:
    """(our model, the transformers model) with the same random weights."""
    layers = {"gemma2": 4, "gemma3_text": 6}[model_type]  # Gemma 3: five sliding ones to a full one
    values = tiny_config(model_type, sliding_window=window, num_hidden_layers=layers)
    reference = hf_model(values, seed=1, dtype=dtype)
    # Smaller word vectors: else the residual stream is mostly the last token, and it is repeated for ever.
    reference.model.embed_tokens.weight.data *= 0.25
    config = GemmaConfig.from_dict(reference.config.to_dict())
    return fill(Model(config, dtype=dtype), reference.state_dict()), reference


@cache
def small_model(vocab_size: int = 64, window: int = 6, context: int = 96) -> Model:
    """The smallest network with both kinds of layer: for tests of bookkeeping, thousands of requests."""
    values = {**TINY, "model_type": "gemma2", "vocab_size": vocab_size, "hidden_size": 16, "intermediate_size": 24}
    values |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    values |= {"sliding_window": window, "max_position_embeddings": context}
    model = Model(GemmaConfig.from_dict(values), dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if not name.endswith("scale"):
            parameter.data.copy_(
                torch.randn(parameter.shape, generator=generator) * (0.1 if name == "embed.weight" else 0.4)
            )
    return model


def prompts_of(*lengths: int, seed: int = 5) -> list[list[int]]:
    chooser = random.Random(seed)
    return [[chooser.randrange(320) for _ in range(n)] for n in lengths]


PROMPTS = prompts_of(1, 2, 7, 13, 16, 17, 31, 58)


def greedy_by_transformers(reference: Any, prompt: list[int], new: int = GREEDY.max_new_tokens) -> list[int]:
    ids = torch.tensor([prompt])
    settings = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():  # the mask, since transformers would hide tokens that look like padding
        out = reference.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return out[0, len(prompt) :].tolist()


class Recording(Engine):
    """The real engine, which also keeps every row of logits it made, by request and number of tokens before it."""

    def __init__(self, model: Model, **sizes: Any) -> None:
        super().__init__(model, CPU, EngineConfig(**{"block_size": 4, **sizes}))
        self.rows: dict[int, dict[int, Tensor]] = {}
        self.live: dict[int, Sequence] = {}
        self.steps = 0
        inner = self.runner.run

        def run(batch: Any, tables: Any) -> Tensor:
            self.steps += 1
            logits = inner(batch, tables)
            for row, scheduled in zip(logits, [s for s in batch if s.samples], strict=True):
                sequence = scheduled.sequence
                self.rows.setdefault(sequence.id, {})[len(sequence.tokens)] = row.clone()
            return logits

        self.runner.run = run  # type: ignore[method-assign]

    def add(self, prompt: Many[int], params: SamplingParams = GREEDY, **request: Any) -> Sequence:
        sequence = self.submit(Request(prompt_ids=tuple(prompt), params=params, **request))
        self.live[sequence.id] = sequence
        return sequence

    def finish(self, limit: int = 100_000) -> list[TokenEvent]:
        """Step until nothing is left; a step limit turns a livelock into a failure."""
        events: list[TokenEvent] = []
        for _ in range(limit):
            if not self.has_work:
                return events
            events += self.step()
        raise AssertionError(f"still at work after {limit} steps")

    def answers(
        self, prompts: Many[Many[int]], params: SamplingParams | Many[SamplingParams] = GREEDY
    ) -> list[list[int]]:
        """Run prompts together; their new tokens."""
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        sequences = [self.add(p, own) for p, own in zip(prompts, each, strict=True)]
        self.finish()
        return [s.tokens[s.prompt_length :] for s in sequences]

    def largest_error(self) -> float:
        """Largest distance of any logit the engine made from the whole sequence run without a cache."""
        worst = 0.0
        for request_id, rows in self.rows.items():
            tokens = self.live[request_id].tokens
            expected = dense_logits(self.model, torch.tensor(tokens))
            for length, row in rows.items():
                worst = max(worst, (row - expected[length - 1]).abs().max().item())
        return worst


def settled(engine: Engine, seconds: float = 20) -> None:
    """Wait until the thread of the engine's loop, if it has one, has nothing left to do."""
    until = time.monotonic() + seconds
    while engine.owner is not None and (engine.has_work or engine._call is not None) and time.monotonic() < until:
        time.sleep(0.001)


def assert_nothing_held(engine: Engine) -> None:
    """After the last request: every block free, nobody registered anywhere. A loop's thread may still end its step."""
    settled(engine)
    for pool in (engine.cache.full, engine.cache.sliding):
        assert pool.free == pool.count
        assert not any(pool._users)
    assert not engine.scheduler.tables
    assert not engine.scheduler.running
    assert not engine.scheduler.waiting
    assert not engine._sequences
    assert not engine.has_work


def assert_consistent(engine: Engine) -> None:
    """Blocks and tables agree in every detail, at any moment between steps."""
    cache, scheduler = engine.cache, engine.scheduler
    assert {s.id for s in scheduler.running} == set(scheduler.tables)
    assert {s.id for s in scheduler.running} | {s.id for s in scheduler.waiting} | set(engine._new) == set(
        engine._sequences
    )
    holders: dict[str, Counter[int]] = {"full": Counter(), "sliding": Counter()}
    for sequence in scheduler.running:
        tables = scheduler.tables[sequence.id]
        size = cache.block_size
        assert len(tables.full) * size >= sequence.computed
        held = tables.sliding[tables.first_sliding :]
        assert -1 not in held
        assert set(tables.sliding[: tables.first_sliding]) <= {-1}
        assert len(held) <= sliding_blocks_needed(cache.config, 10**9, scheduler.max_batch_tokens, size)
        holders["full"].update(tables.full)
        holders["sliding"].update(held)
        # What others may find in this table's blocks is what this sequence's tokens say.
        key = sequence.root_key
        for index in range(tables.published):
            key = block_key(key, sequence.tokens[index * size : (index + 1) * size])
            assert sequence.block_keys[index] == key
            assert cache.full._key_of.get(tables.full[index], key) == key
    for name, pool in (("full", cache.full), ("sliding", cache.sliding)):
        assert_pool(pool, holders[name])


def assert_pool(pool: BlockPool, holders: Counter[int]) -> None:
    assert pool._users == [holders[block] for block in range(pool.count)]
    blank, kept = list(pool._blank), list(pool._kept)
    unused = {block for block in range(pool.count) if not holders[block]}
    assert len(blank) + len(kept) == len(unused) == pool.free
    assert set(blank) | set(kept) == unused
    assert {block: key for key, block in pool._block_of.items()} == pool._key_of
    assert not set(blank) & set(pool._key_of)
    assert set(kept) <= set(pool._key_of)
