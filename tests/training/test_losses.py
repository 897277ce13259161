"""The head and its losses against float64 numpy; gradients against torch's autograd and finite differences."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from gemcut.config import FAMILY
from gemcut.training import losses
from gemcut.training.network import Network

B, T, D, V, CAP, K = 2, 12, 8, 40, 3.0, 5
CONFIG = FAMILY["gemma-2-2b"].replace(vocab_size=V, hidden_size=D, final_logit_softcapping=CAP)


def arrays() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    top = random.permuted(np.tile(np.arange(V), (B, T, 1)), axis=-1)[..., :K].astype(np.int32)
    return {
        "hidden": random.normal(size=(B, T, D)),
        "table": random.normal(size=(V, D)),
        "teacher": random.normal(size=(B, T, D)),
        "teacher_table": random.normal(size=(V, D)),
        "targets": random.integers(0, V, (B, T)).astype(np.int32),
        "weights": random.integers(0, 2, (B, T)).astype(np.float64),
        "top_ids": top,
        "top_probabilities": random.dirichlet(np.ones(K + 1), (B, T))[..., :K],
    }


def torch_loss(kind: str, x: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss in float64, from its definition, with all logits in memory."""
    logits = CAP * torch.tanh(x["hidden"] @ x["table"].T / CAP)
    log_q = logits.log_softmax(-1)
    nll = -log_q.gather(-1, x["targets"].long()[..., None])[..., 0]
    if kind == "next token":
        rows = nll
    elif kind == "next token, z":
        rows = nll + 0.1 * logits.logsumexp(-1) ** 2
    elif kind == "teacher":
        p = (CAP * torch.tanh(x["teacher"] @ x["teacher_table"].T / CAP) / 2).softmax(-1)
        rows = 0.7 * 4 * (p * (p.log() - (logits / 2).log_softmax(-1))).sum(-1) + 0.3 * nll
    else:
        q, p = log_q.exp().gather(-1, x["top_ids"].long()), x["top_probabilities"]
        rows = -(p * q.log()).sum(-1) - (1 - p.sum(-1)) * (1 - q.sum(-1)).log()
    return (rows * x["weights"]).sum()


SCORES = {
    "next token": losses.next_token(),
    "next token, z": losses.next_token(0.1),
    "teacher": losses.distil(CAP, 2.0, 0.7),
    "stored": losses.distil_stored(),
}


@pytest.mark.parametrize("kind", SCORES)
def test_losses_and_gradients_are_those_of_their_definitions_in_float64(kind: str) -> None:
    data = arrays()
    theirs = {name: torch.tensor(value) for name, value in data.items()}
    theirs["hidden"].requires_grad_()
    theirs["table"].requires_grad_()
    right = torch_loss(kind, theirs)
    right.backward()
    with jax.enable_x64(True):
        network = Network(CONFIG, jnp.float64)
        extras = {name: value for name, value in data.items() if name not in ("hidden", "table", "teacher_table")}

        def loss(hidden, table):
            constants = {"teacher_table": jnp.asarray(data["teacher_table"])}
            return losses.head_loss(network, SCORES[kind], hidden, table, extras, constants, rows=8)[0] / 3

        value, (dh, dtable) = jax.jit(jax.value_and_grad(loss, (0, 1)))(data["hidden"], data["table"])
        assert float(value) == pytest.approx(right.item() / 3, rel=1e-12)
        assert float(loss(data["hidden"], data["table"])) == pytest.approx(right.item() / 3, rel=1e-12)
    np.testing.assert_allclose(dh, theirs["hidden"].grad / 3, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(dtable, theirs["table"].grad / 3, rtol=1e-9, atol=1e-12)


def test_what_is_learned_of_packed_documents_and_answers() -> None:
    batch = {
        "tokens": jnp.asarray([[2, 5, 6, 2, 7, 8, 0]]),
        "segments": jnp.asarray([[1, 1, 1, 2, 2, 2, 0]]),
    }
    assert losses.targets(batch)["weights"].tolist() == [[1, 1, 0, 1, 1, 0, 0]]
    assert losses.targets(batch)["targets"][0, :2].tolist() == [5, 6]
    answers = losses.targets({**batch, "answer": jnp.asarray([[0, 0, 1, 0, 0, 1, 0]])})
    assert answers["weights"].tolist() == [[0, 1, 0, 0, 1, 0, 0]]


def test_logits_of_the_whole_batch_are_never_in_memory() -> None:
    """By the compiled program's own account, with gradients: 4,096 rows of 16,384 words would be 256 MiB."""
    config = CONFIG.replace(vocab_size=16384, hidden_size=16)
    network = Network(config, jnp.bfloat16)
    rows = jax.ShapeDtypeStruct((4, 1024), jnp.int32)
    hidden = jax.ShapeDtypeStruct((4, 1024, 16), jnp.bfloat16)
    table = jax.ShapeDtypeStruct((16384, 16), jnp.float32)

    def loss(hidden, table, targets, rows_at_once):
        extras = {"targets": targets, "weights": jnp.ones(targets.shape)}
        return losses.head_loss(network, losses.next_token(), hidden, table, extras, rows=rows_at_once)[0]

    def temporary(rows_at_once: int) -> int:
        run = jax.jit(jax.grad(lambda *x: loss(*x, rows_at_once), (0, 1)))
        return run.lower(hidden, table, rows).compile().memory_analysis().temp_size_in_bytes

    assert temporary(256) < 80 << 20 < 256 << 20 <= temporary(4096)
