"""Tensor parallelism: one network over several devices of one host."""
