"""All layers of one sequence's decode step in one launch."""
