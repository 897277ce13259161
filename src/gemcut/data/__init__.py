"""Raw documents into training shards: recipes, readers, filters, deduplication, shards. Imports no torch."""
