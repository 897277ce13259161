"""The next token from logits: argmax and random draws."""
