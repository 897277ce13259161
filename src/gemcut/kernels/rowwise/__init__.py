"""Operations on rows: norms, the gated product, rotation and the write into the cache."""
