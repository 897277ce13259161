"""Number formats: what a weight is cut to, and how it is dequantized. Pure functions, no kernels."""
