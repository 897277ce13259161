"""The rows, a module for those that are asked and scored alike. ``ROWS`` of each is found by the registry."""
