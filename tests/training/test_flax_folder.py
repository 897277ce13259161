"""Google's Flax layout: each imported tensor must do in a linear layer what the published einsum does with the leaf."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemcut.config import GemmaConfig
from gemcut.errors import CheckpointError, ConfigError
from gemcut.training.flax_folder import FlaxFolder
from support import tiny_config

ocp = pytest.importorskip("orbax.checkpoint", reason="needs the train extra: pip install -e '.[train]'")
Leaves = dict[str, np.ndarray[Any, Any]]


def shape(model_type: str = "gemma2", **changes: Any) -> GemmaConfig:
    return GemmaConfig.from_dict(tiny_config(model_type, num_hidden_layers=2, **changes).to_dict())


def leaves(c: GemmaConfig, *, transposed: bool = True, together: bool = False, extra_rows: int = 5) -> Leaves:
    """A random network as Google's Flax code has it, names joined with "/"."""
    D, F, H, N, K = c.hidden_size, c.intermediate_size, c.head_dim, c.num_attention_heads, c.num_key_value_heads
    shapes: dict[str, tuple[int, ...]] = {"embedder/input_embedding": (c.vocab_size + extra_rows, D)}
    for i in range(c.num_hidden_layers):
        at = f"layer_{i}/"
        for norm in ("pre_attention_norm", "post_attention_norm", "pre_ffw_norm", "post_ffw_norm"):
            shapes[f"{at}{norm}/scale"] = (D,)
        if c.qk_norm:
            shapes |= {f"{at}attn/_query_norm/scale": (H,), f"{at}attn/_key_norm/scale": (H,)}
        if together:
            shapes[f"{at}attn/qkv_einsum/w"] = (3, N, D, H)
        else:
            shapes |= {f"{at}attn/q_einsum/w": (N, D, H), f"{at}attn/kv_einsum/w": (2, K, D, H)}
        shapes[f"{at}attn/attn_vec_einsum/w"] = (N, H, D)
        shapes[f"{at}mlp/gating_einsum"] = (2, F, D) if transposed else (2, D, F)
        shapes[f"{at}mlp/linear"] = (F, D)
    shapes["final_norm/scale"] = (D,)
    random = np.random.default_rng(0)
    return {f"transformer/{name}": random.standard_normal(s).astype(np.float32) for name, s in shapes.items()}


def save(folder: Path, found: Leaves, how: str = "nested") -> Path:
    """Write with orbax: names nested, or joined up to the last, as the published folders have them."""
    tree: dict[str, Any] = {}
    for name, values in found.items():
        *outer, last = name.split("/") if how == "nested" else name.rsplit("/", 1)
        node = tree
        for key in outer:
            node = node.setdefault(key, {})
        node[last] = values
    ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=how == "nested")).save(folder, tree)
    return folder


@pytest.mark.parametrize("how", ["nested", "joined"])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "together"])
def test_each_tensor_does_what_the_leaf_does(tmp_path: Path, kind: str, transposed: bool, how: str) -> None:
    together = kind == "together"
    config = shape(num_key_value_heads=4) if together else shape(kind)
    theirs = leaves(config, transposed=transposed, together=together)
    folder = FlaxFolder(save(tmp_path / "flax", theirs, how), config)
    ours = {name: folder.read(name) for name in folder.names}
    x = np.random.default_rng(1).standard_normal((3, config.hidden_size)).astype(np.float32)
    wide = np.random.default_rng(2).standard_normal((3, config.intermediate_size)).astype(np.float32)
    heads = np.random.default_rng(3).standard_normal((3, config.num_attention_heads, config.head_dim))
    for i in range(config.num_hidden_layers):
        leaf = {name.removeprefix(f"transformer/layer_{i}/"): v for name, v in theirs.items() if f"/layer_{i}/" in name}
        hf = {name.removeprefix(f"model.layers.{i}."): v for name, v in ours.items() if f".layers.{i}." in name}
        if together:
            q, k, v = np.einsum("TD,SNDH->STNH", x, leaf["attn/qkv_einsum/w"])
        else:
            q = np.einsum("TD,NDH->TNH", x, leaf["attn/q_einsum/w"])
            k, v = np.einsum("TD,CKDH->CTKH", x, leaf["attn/kv_einsum/w"])
        for name, wanted in (("q", q), ("k", k), ("v", v)):
            assert np.allclose(x @ hf[f"self_attn.{name}_proj.weight"].T, wanted.reshape(3, -1), atol=1e-4)
        out = np.einsum("TNH,NHD->TD", heads, leaf["attn/attn_vec_einsum/w"])
        assert np.allclose(heads.reshape(3, -1) @ hf["self_attn.o_proj.weight"].T, out, atol=1e-4)
        for part, name in enumerate(("gate", "up")):
            product = np.einsum("TD,FD->TF" if transposed else "TD,DF->TF", x, leaf["mlp/gating_einsum"][part])
            assert np.allclose(x @ hf[f"mlp.{name}_proj.weight"].T, product, atol=1e-4)
        assert np.allclose(wide @ hf["mlp.down_proj.weight"].T, wide @ leaf["mlp/linear"], atol=1e-4)
        for mine, norm in (
            ("input_layernorm", "pre_attention_norm"),
            ("post_attention_layernorm", "post_attention_norm"),
            ("pre_feedforward_layernorm", "pre_ffw_norm"),
            ("post_feedforward_layernorm", "post_ffw_norm"),
        ):
            assert np.array_equal(hf[f"{mine}.weight"], leaf[f"{norm}/scale"])
        if config.qk_norm:
            assert np.array_equal(hf["self_attn.q_norm.weight"], leaf["attn/_query_norm/scale"])
            assert np.array_equal(hf["self_attn.k_norm.weight"], leaf["attn/_key_norm/scale"])
    table = theirs["transformer/embedder/input_embedding"]
    assert np.array_equal(ours["model.embed_tokens.weight"], table[: config.vocab_size])
    assert np.array_equal(ours["model.norm.weight"], theirs["transformer/final_norm/scale"])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "leaf layer_1/mlp/linear is missing"),
        ("surplus", "unexpected leaf layer_2/mlp/linear: the config has no place"),
        ("shape", r"leaf layer_1/mlp/linear has shape \[48, 96\]; the config asks for \[96, 48\]"),
        ("dtype", r"leaf layer_1/mlp/linear has dtype int8; expected one of"),
        ("short table", r"leaf embedder/input_embedding has shape \[319, 48\]"),
        ("nan", r"tensor model\.layers\.1\.mlp\.down_proj\.weight holds NaN or infinity"),
    ],
)
def test_the_wrong_leaf_is_named(tmp_path: Path, what: str, message: str) -> None:
    config, name = shape(), "transformer/layer_1/mlp/linear"
    found = leaves(config, extra_rows=-1 if what == "short table" else 5)
    if what == "missing":
        del found[name]
    elif what == "surplus":
        found["transformer/layer_2/mlp/linear"] = found[name]
    elif what == "shape":
        found[name] = found[name].T.copy()
    elif what == "dtype":
        found[name] = found[name].astype(np.int8)
    elif what == "nan":
        found[name][3, 3] = np.nan
    save(tmp_path / "flax", found)
    with pytest.raises(CheckpointError, match=message) as error:
        FlaxFolder(tmp_path / "flax", config).read("model.layers.1.mlp.down_proj.weight")
    assert "\n" not in str(error.value)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no folder"):
        FlaxFolder(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is no orbax checkpoint of Gemma") as error:
        FlaxFolder(tmp_path)
    assert "\n" not in str(error.value)
    save(tmp_path / "flax", leaves(shape()))
    with pytest.raises(ConfigError, match=r"2 layers and a table of \[325, 48\] are none of gemma-2-2b"):
        FlaxFolder(tmp_path / "flax")
