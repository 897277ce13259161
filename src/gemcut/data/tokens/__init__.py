"""From documents to token shards, and back."""
