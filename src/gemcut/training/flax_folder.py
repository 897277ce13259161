"""Read the Flax checkpoints that Google publishes of Gemma (orbax folders), under Hugging Face names.

A leaf is called ``transformer/layer_3/attn/q_einsum/w``; some folders nest the names, others join them with "/". Norms
hold ``w`` of ``1 + w``, as Hugging Face's do. The table of input embeddings has rows past the vocabulary: they are cut.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemcut.checkpoint import names
from gemcut.config import FAMILY, GemmaConfig
from gemcut.errors import CheckpointError, ConfigError, ParameterError
from gemcut.training.importing import Array, check_finite

_NORMS = {
    "input_layernorm": "pre_attention_norm/scale",
    "post_attention_layernorm": "post_attention_norm/scale",
    "pre_feedforward_layernorm": "pre_ffw_norm/scale",
    "post_feedforward_layernorm": "post_ffw_norm/scale",
    "self_attn.q_norm": "attn/_query_norm/scale",
    "self_attn.k_norm": "attn/_key_norm/scale",
}
_TABLE, _FINAL = "embedder/input_embedding", "final_norm/scale"
_FLOATS = ("float32", "float16", "bfloat16")
Keys = tuple[str, ...]


class FlaxFolder:
    """Whole weights of an orbax folder in the layout of Google's Flax release of Gemma.

    ``config`` None takes the published shape that the leaves have. At most one leaf is in memory beside what ``read``
    gave; a leaf may hold two or three tensors (gate and up; keys and values).
    Raises CheckpointError or ConfigError naming the leaf that is missing, surplus or of a wrong shape.
    """

    def __init__(self, folder: str | Path, config: GemmaConfig | None = None) -> None:
        self.folder = Path(folder).absolute()
        self._checkpointer, tree = _open(self.folder)
        self._keys: dict[str, Keys] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for keys, leaf in _leaves(tree):
            name = "/".join(keys).removeprefix("params/").removeprefix("transformer/")
            if str(getattr(leaf, "dtype", None)) not in _FLOATS:
                raise CheckpointError(
                    f"{self.folder}: leaf {name} has dtype {getattr(leaf, 'dtype', None)}; expected one of "
                    f"{', '.join(_FLOATS)}"
                )
            # Some exports give matrices a "w" of their own, others not.
            short = re.sub(r"(mlp/(?:gating_einsum|linear))/w$", r"\1", name)
            self._keys[short], self._shapes[short] = keys, tuple(leaf.shape)
        self.config = config or self._published()
        self._check()
        self._held: tuple[str, Array] | None = None

    @property
    def names(self) -> list[str]:
        """Hugging Face's name of every tensor the config asks for."""
        return [names.to_hf(ours) for ours in names.expected_shapes(self.config)]

    def read(self, name: str) -> Array:
        """One tensor as Hugging Face shapes it, in the dtype it is stored in. Raises CheckpointError."""
        found = self._tensor(name)
        check_finite(f"{self.folder}: tensor {name}", found)
        return np.ascontiguousarray(found)

    def _tensor(self, name: str) -> Array:
        c = self.config
        if name == "model.embed_tokens.weight":
            return self._leaf(_TABLE)[: c.vocab_size]
        if name == "model.norm.weight":
            return self._leaf(_FINAL)
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
        assert match, name
        layer, module = f"layer_{match[1]}/", match[2]
        if module in _NORMS:
            return self._leaf(layer + _NORMS[module])
        kind = module.rpartition(".")[2].removesuffix("_proj")
        if kind in "qkv":
            heads = self._heads(layer, kind).transpose(0, 2, 1)  # (heads, head_dim, D)
            return heads.reshape(-1, c.hidden_size)
        if kind == "o":
            return self._leaf(f"{layer}attn/attn_vec_einsum/w").reshape(c.query_size, c.hidden_size).T
        if kind == "down":
            return self._leaf(f"{layer}mlp/linear").T
        half: Array = self._leaf(f"{layer}mlp/gating_einsum")[int(kind == "up")]
        return half if half.shape[0] == c.intermediate_size else half.T

    def _heads(self, layer: str, kind: str) -> Array:
        together = f"{layer}attn/qkv_einsum/w"
        if kind == "q" and together not in self._keys:
            return self._leaf(f"{layer}attn/q_einsum/w")
        leaf, order = (together, "qkv") if together in self._keys else (f"{layer}attn/kv_einsum/w", "kv")
        heads: Array = self._leaf(leaf)[order.index(kind)]
        return heads

    def _leaf(self, name: str) -> Array:
        """A leaf's numbers; the last one is kept, for its other tensors."""
        if self._held is None or self._held[0] != name:
            self._held = None  # before the next one is read
            self._held = (name, _restore(self._checkpointer, self.folder, self._keys[name], name))
        return self._held[1]

    def _published(self) -> GemmaConfig:
        table = self._shapes.get(_TABLE, ())
        layers = {name.split("/")[0] for name in self._shapes if name.startswith("layer_")}
        size = (len(layers), *table[-1:])
        known = [c for c in FAMILY.values() if (c.num_hidden_layers, c.hidden_size) == size]
        if len(known) != 1:
            raise ConfigError(
                f"{self.folder}: {len(layers)} layers and a table of {list(table)} are none of "
                f"{', '.join(FAMILY)}; give the config"
            )
        return known[0]

    def _check(self) -> None:
        """Raise CheckpointError unless the leaves are exactly what the config needs."""
        wanted = _wanted(self.config, self._shapes)
        for name, shapes in wanted.items():
            found = self._shapes.get(name)
            if found is None:
                raise CheckpointError(f"{self.folder}: leaf {name} is missing; the checkpoint is incomplete")
            if name == _TABLE and len(found) == 2 and found[0] > self.config.vocab_size:
                found = (self.config.vocab_size, found[1])
            if found not in shapes:
                raise CheckpointError(
                    f"{self.folder}: leaf {name} has shape {list(self._shapes[name])}; the config asks for "
                    f"{' or '.join(str(list(shape)) for shape in shapes)}"
                )
        for name in self._shapes:
            if name not in wanted:
                raise CheckpointError(f"{self.folder}: unexpected leaf {name}: the config has no place for it")


def _wanted(c: GemmaConfig, found: Mapping[str, object]) -> dict[str, list[tuple[int, ...]]]:
    """Each leaf's possible shapes."""
    D, F, H, N, K = c.hidden_size, c.intermediate_size, c.head_dim, c.num_attention_heads, c.num_key_value_heads
    wanted: dict[str, list[tuple[int, ...]]] = {_TABLE: [(c.vocab_size, D)], _FINAL: [(D,)]}
    for i in range(c.num_hidden_layers):
        at = f"layer_{i}/"
        for module, leaf in _NORMS.items():
            if "self_attn" not in module:
                wanted[at + leaf] = [(D,)]
            elif c.qk_norm:
                wanted[at + leaf] = [(H,)]
        if K == N and f"{at}attn/qkv_einsum/w" in found:
            wanted[f"{at}attn/qkv_einsum/w"] = [(3, N, D, H)]
        else:
            wanted[f"{at}attn/q_einsum/w"] = [(N, D, H)]
            wanted[f"{at}attn/kv_einsum/w"] = [(2, K, D, H)]
        wanted[f"{at}attn/attn_vec_einsum/w"] = [(N, H, D)]
        wanted[f"{at}mlp/gating_einsum"] = [(2, F, D), (2, D, F)]  # larger models store the transpose
        wanted[f"{at}mlp/linear"] = [(F, D)]
    return wanted


def _open(folder: Path) -> tuple[Any, Mapping[str, Any]]:
    try:
        import orbax.checkpoint as ocp
    except ImportError:
        raise ParameterError("Flax checkpoints need orbax: pip install 'gemcut[train]'") from None
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; expected an orbax checkpoint of Gemma")
    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    try:
        tree = checkpointer.metadata(folder).item_metadata.tree
        if not isinstance(tree, Mapping) or not tree:
            raise ValueError("no tree")
    except Exception as error:  # orbax and tensorstore raise many kinds for a damaged folder
        raise CheckpointError(
            f"{folder} is no orbax checkpoint of Gemma ({_line(error)}); expected the folder that holds _METADATA"
        ) from None
    return checkpointer, tree


def _leaves(tree: Mapping[str, Any], keys: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*keys, str(key)))
        else:
            yield (*keys, str(key)), value


def _restore(checkpointer: Any, folder: Path, keys: Keys, name: str) -> Array:
    import orbax.checkpoint as ocp

    def nested(value: object) -> Any:
        for key in reversed(keys):
            value = {key: value}
        return value

    how = ocp.args.PyTreeRestore(
        item=nested(0), restore_args=nested(ocp.RestoreArgs(restore_type=np.ndarray)), partial_restore=True
    )
    try:
        found = checkpointer.restore(folder, args=how)
    except Exception as error:
        raise CheckpointError(f"{folder}: leaf {name} cannot be read ({_line(error)}); get the folder again") from None
    for key in keys:
        found = found[key]
    return np.asarray(found)


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:160] if text else type(error).__name__
