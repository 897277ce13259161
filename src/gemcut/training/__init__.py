"""Pretraining and distillation in JAX. Imports no torch and nothing of the engine: folders are the contract."""
