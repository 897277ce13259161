"""Products of activations and weights in every format: GEMV, GEMM, gated GEMM, and dequantization for cuBLAS."""
