"""The card's intended uses: plain functions over Gemma. The commands, and whoever calls them, share this code."""
