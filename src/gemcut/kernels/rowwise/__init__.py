"""Operations on rows: norms, GeGLU, rotation and the write into the cache."""
