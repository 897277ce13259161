"""Steps that judge documents: where they are from, their language, their quality."""
