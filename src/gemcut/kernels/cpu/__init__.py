"""Kernels for CPUs: small C++ files behind plain C functions, called through ctypes.

``build`` compiles them when the package is installed, ``library`` loads them and says what they can do here,
``linear`` gives them to dispatch. Without the library everything runs on plain PyTorch.
"""
