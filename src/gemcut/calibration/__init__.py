"""A checkpoint quantized by what it does to a text, and what that cost: divergence, streamed comparison."""
