"""gemcut: Google's Gemma 2, made usable. Load it, chat with it, score with it, on a CPU or a GPU."""

__version__ = "0.1.0"
