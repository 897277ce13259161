"""Compiling CUDA sources with NVRTC, keeping cubins, launching."""
