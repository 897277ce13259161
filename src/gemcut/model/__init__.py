"""The network: Gemma 2 and Gemma 3 (text) in plain PyTorch, right on any device."""

from gemcut.model.gemma import Model

__all__ = ["Model"]
