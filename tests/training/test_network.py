"""The network for training against transformers and against our torch network."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from gemcut.config import FAMILY
from gemcut.errors import ParameterError
from gemcut.training.attention import AttentionShape, attention, splash_attention
from gemcut.training.network import REMAT, Network
from gemcut.training.parameters import from_hf, initialise, shapes, to_hf, weights
from model.build import our_logits
from support import hf_model, tiny_config
from training.torch_reference import all_double, gradients_of, relative_errors, tree_of

T = 11  # > the window of 4


def inputs(vocab: int, rows: int = 2, length: int = T) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    tokens = np.random.default_rng(0).integers(3, vocab, (rows, length)).astype(np.int32)
    return tokens, np.ones_like(tokens), np.tile(np.arange(length, dtype=np.int32), (rows, 1))


def logits(config, tree, tokens, segments, positions, **options):
    network = Network(config, **{"compute_dtype": jnp.float32, **options})

    @jax.jit
    def run(tree):
        return network.logits(tree, network.hidden(tree, tokens, segments, positions))

    return np.asarray(run(tree))


CASES = {
    "gemma2": tiny_config(),
    "gemma2, head geometry of 27B": tiny_config(
        hidden_size=96,
        num_attention_heads=32,
        num_key_value_heads=16,
        head_dim=128,
        query_pre_attn_scalar=144,
        num_hidden_layers=2,
    ),
    "gemma3, a rest of two layers": tiny_config("gemma3_text", num_hidden_layers=8),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name: str) -> None:
    model = hf_model(CASES[name])
    config, tree = tree_of(model)
    batch = inputs(config.vocab_size)
    with torch.no_grad():
        right = model(torch.tensor(batch[0], dtype=torch.long)).logits.numpy()
    assert np.abs(logits(config, tree, *batch) - right).max() <= 1e-4
    assert np.abs(right).max() > 1  # the caps and the spread of the test matter


@pytest.mark.slow
def test_logits_of_a_layer_of_full_width() -> None:
    config = tiny_config(
        hidden_size=2304, intermediate_size=9216, num_attention_heads=8, num_key_value_heads=4, head_dim=256,
        query_pre_attn_scalar=256, num_hidden_layers=1, attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
    )  # fmt: skip
    model = hf_model(config)
    config, tree = tree_of(model)
    batch = inputs(config.vocab_size, 1)
    with torch.no_grad():
        right = model(torch.tensor(batch[0], dtype=torch.long)).logits.numpy()
    assert np.abs(logits(config, tree, *batch) - right).max() <= 1e-4


def test_logits_are_those_of_our_torch_network() -> None:
    model = hf_model(tiny_config())
    config, tree = tree_of(model)
    batch = inputs(config.vocab_size, 1)
    right = our_logits(model, torch.tensor(batch[0][0], dtype=torch.long))
    assert np.abs(logits(config, tree, *batch)[0] - right.numpy()).max() <= 1e-4


@pytest.mark.parametrize("name", ["gemma2", "gemma3, a rest of two layers"])
def test_gradients_are_those_of_torch_autograd_in_float64(name: str) -> None:
    model = hf_model(CASES[name], dtype=torch.float64)
    with jax.enable_x64(True):
        config, tree = tree_of(model, np.float64)
        tokens, segments, positions = inputs(config.vocab_size)
        ids = torch.tensor(tokens, dtype=torch.long)
        pull = np.random.default_rng(1).normal(size=(2, T, config.vocab_size))
        with all_double(model):
            (model(ids).logits * torch.tensor(pull)).sum().backward()
        for remat in ("none", "full"):
            network = Network(config, jnp.float64, remat=remat)

            @jax.jit
            @jax.grad
            def gradient(tree, network=network):
                return (network.logits(tree, network.hidden(tree, tokens, segments, positions)) * pull).sum()

            errors = relative_errors(gradient(tree), gradients_of(model, config))
            assert max(errors.values()) <= 1e-6, errors


def test_packed_documents_are_those_alone() -> None:
    """Two documents and padding in one row: each gets the logits it has in a row of its own."""
    model = hf_model(tiny_config())
    config, tree = tree_of(model)
    tokens, _, _ = inputs(config.vocab_size, 1, 14)
    segments = np.array([[1] * 7 + [2] * 5 + [0] * 2], np.int32)
    positions = np.array([[*range(7), *range(5), 0, 0]], np.int32)
    ours = logits(config, tree, tokens, segments, positions)[0]
    for part in (slice(0, 7), slice(7, 12)):
        with torch.no_grad():
            right = model(torch.tensor(tokens[:, part], dtype=torch.long)).logits[0].numpy()
        assert np.abs(ours[part] - right).max() <= 1e-4
    assert np.isfinite(ours).all()


@pytest.mark.parametrize("options", [{"remat": remat} for remat in REMAT] + [{"lookup": "onehot"}], ids=str)
def test_remat_and_look_up_change_nothing(options: dict[str, str]) -> None:
    config = tree_of(hf_model(tiny_config(num_hidden_layers=2)))[0]
    tree = initialise(config, jax.random.key(0))
    tokens, segments, positions = inputs(config.vocab_size)
    # Not a sum of squares: the last norm makes it constant, and its gradient is rounding alone.
    pull = np.random.default_rng(1).normal(size=(2, T, config.hidden_size)).astype(np.float32)

    def gradient(**options):
        network = Network(config, jnp.float32, **options)
        return jax.jit(jax.grad(lambda tree: (network.hidden(tree, tokens, segments, positions) * pull).sum()))(tree)

    errors = relative_errors(gradient(**options), jax.tree.map(np.asarray, gradient()))
    assert max(value for value in errors.values() if value == value) <= 1e-5, errors


def test_the_tree_of_the_published_shapes_has_their_parameters() -> None:
    for name, config in FAMILY.items():
        sizes = [np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes(config))]
        assert sum(sizes) == config.num_parameters(), name
        names = [hf for weight in weights(config) for hf in weight.hf_names()]
        assert len(names) == len(set(names))


def test_names_and_transpositions_go_both_ways() -> None:
    model = hf_model(CASES["gemma3, a rest of two layers"])
    config, tree = tree_of(model)
    out = dict(to_hf(config, tree))
    right = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    assert out.keys() == right.keys()
    for name, value in right.items():
        np.testing.assert_array_equal(out[name], value.numpy())
    back = from_hf(config, out.__getitem__)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), tree, back))


@pytest.mark.slow
@pytest.mark.parametrize("window", [100, None])
def test_splash_in_interpret_mode_is_plain_attention(window: int | None) -> None:
    """The Pallas kernel for TPUs, interpreted on the processor: values and gradients, packed, capped, with a window."""
    shape = AttentionShape(128, window, 50.0)
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (1, 256, 4, 128)) * 3
    k, v = (jax.random.normal(key, (1, 256, 2, 128)) for key in keys[1:3])
    segments = jnp.asarray([[1] * 150 + [2] * 106], jnp.int32)
    pull = jax.random.normal(keys[3], q.shape)

    def both(attend):
        return jax.jit(jax.value_and_grad(lambda *x: (attend(*x, segments) * pull).sum(), (0, 1, 2)))(q, k, v)

    (value, grads), (right, right_grads) = both(splash_attention(shape, interpret=True)), both(attention("xla", shape))
    assert abs(value - right) <= 1e-4 * abs(right) + 1e-2
    for ours, theirs in zip(grads, right_grads, strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)


def test_what_a_kernel_cannot_do_is_refused_by_name() -> None:
    config = tree_of(hf_model(tiny_config()))[0]
    with pytest.raises(ParameterError, match=r"'splash' cannot be used: it takes heads of whole 128.*have 16"):
        Network(config, attention="splash")
    with pytest.raises(ParameterError, match="attention is 'flash'; expected one of xla, splash"):
        Network(config, attention="flash")
    with pytest.raises(ParameterError, match="remat is 'some'; expected one of none, dots"):
        Network(config, remat="some")
    x, splash = jnp.zeros((1, 100, 1, 128)), attention("splash", AttentionShape(128, None, None))
    with pytest.raises(ParameterError, match="whole blocks of 128; this one is 100"):
        splash(x, x, x, jnp.ones((1, 100), jnp.int32))
