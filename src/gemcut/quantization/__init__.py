"""Number formats: what a weight is cut to, and how it is decoded. Pure functions, no kernels."""
