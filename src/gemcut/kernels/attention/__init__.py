"""Attention over packed sequences (varlen) and over the paged cache (decode)."""
