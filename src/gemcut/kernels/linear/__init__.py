"""Linear layers in every weight format: GEMV, GEMM, gated GEMM, and dequantization for cuBLAS."""
