"""CUDA C++ compiled at run time: NVRTC comes with torch's CUDA wheels, so users need no nvcc.

`compile_kernel` gives a `CudaKernel` that launches on torch's current stream and can be captured in a CUDA graph.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gemcut.errors import UnsupportedError
from gemcut.kernels.runtime import cubin_cache

SOURCES = Path(__file__).parent.parent

# Of cuTensorMapEncodeTiled.
_BFLOAT16, _SWIZZLE_128, _PROMOTE_256 = 9, 3, 3
_STATIC_SHARED = 1  # CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_COOPERATIVE = 2  # CU_LAUNCH_ATTRIBUTE_COOPERATIVE: all blocks at once or none
_PROGRAMMATIC_LAUNCH = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class _LaunchAttribute(ctypes.Structure):
    # CUlaunchAttribute: an id, then a union of 64 bytes at offset 8; the attribute used here is its first int.
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60))


class _LaunchConfig(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("attribute_count", ctypes.c_uint),
    )


def unavailable_reason() -> str | None:
    """None where kernels can be compiled and run here, else one line that says why not."""
    if not torch.cuda.is_available():
        return "run-time CUDA kernels need an NVIDIA GPU; torch.cuda.is_available() is false here"
    if torch.version.cuda is None:
        return "run-time CUDA kernels need a CUDA build of torch; this one is built for another kind of GPU"
    if torch.cuda.get_device_capability() < (8, 0):
        return "run-time CUDA kernels need compute capability 8.0 (Ampere) or newer"
    try:
        _nvrtc()
    except UnsupportedError as error:
        return str(error)
    return None


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    major = (torch.version.cuda or "").split(".")[0]
    name = f"libnvrtc.so.{major}"
    candidates = [name]
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        candidates += [str(p) for folder in (f"cu{major}", "cuda_nvrtc") for p in Path(root, folder, "lib").glob(name)]
    candidates += [str(p) for p in Path(torch.__file__).parent.glob("lib/libnvrtc*.so*") if "builtins" not in p.name]
    for candidate in candidates:
        try:
            return ctypes.CDLL(candidate)
        except OSError:
            continue
    raise UnsupportedError(f"{name} was not found; pip install nvidia-cuda-nvrtc (it comes with torch's CUDA wheels)")


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(status: int, what: str) -> None:
    if status != 0:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"{what} failed: {(text.value or b'unknown error').decode()} ({status})")


def compile_cubin(source: str, options: Sequence[str]) -> bytes:
    """Machine code for `source`. Raises RuntimeError with the compiler's log where the source is wrong."""
    lib = _nvrtc()
    program = ctypes.c_void_p()
    if lib.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"gemcut.cu", 0, None, None) != 0:
        raise RuntimeError("nvrtcCreateProgram failed")
    try:
        encoded = [option.encode() for option in options]
        status = lib.nvrtcCompileProgram(program, len(encoded), (ctypes.c_char_p * len(encoded))(*encoded))
        size = ctypes.c_size_t()
        if status != 0:
            lib.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            lib.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"NVRTC could not compile a kernel: {log.value.decode(errors='replace')}")
        lib.nvrtcGetCUBINSize(program, ctypes.byref(size))
        cubin = ctypes.create_string_buffer(size.value)
        lib.nvrtcGetCUBIN(program, cubin)
        return cubin.raw
    finally:
        lib.nvrtcDestroyProgram(ctypes.byref(program))


def current_stream(device: int) -> int:
    """Torch's current stream of ``device``, as the driver knows it, without making an object of it."""
    return int(torch._C._cuda_getCurrentRawStream(device))


@functools.lru_cache(maxsize=4096)
def _launch_config(grid: tuple[int, ...], threads: int, shared_bytes: int, stream: int, attribute: int) -> Any:
    """A reference to the driver's description of a launch, kept since most come again; ``attribute`` 0: none."""
    config = _LaunchConfig(
        (ctypes.c_uint * 3)(*grid, *(1,) * (3 - len(grid))),
        (ctypes.c_uint * 3)(threads, 1, 1),
        shared_bytes,
        stream,
        ctypes.pointer(_LaunchAttribute(attribute, 0, 1, b"")),
        1 if attribute else 0,
    )
    return ctypes.byref(config)


@dataclass(frozen=True)
class CudaKernel:
    """One loaded kernel of one device."""

    handle: ctypes.c_void_p
    overlaps: bool
    device: int

    def launch(
        self,
        grid: tuple[int, ...],
        threads: int,
        shared_bytes: int,
        arguments: Sequence[ctypes.Structure],
        *,
        cooperative: bool = False,
    ) -> None:
        """Queues the kernel on torch's current stream. Arguments are ctypes structures laid out as in the source.

        ``cooperative`` kernels have blocks that wait for each other: none starts before there is room for all.
        """
        attribute = _COOPERATIVE if cooperative else _PROGRAMMATIC_LAUNCH if self.overlaps else 0
        config = _launch_config(grid, threads, shared_bytes, current_stream(self.device), attribute)
        pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        status = _driver().cuLaunchKernelEx(config, self.handle, pointers, None)
        if status:
            _check(status, "a kernel launch")


class TensorMap(ctypes.Structure):
    """A TMA tensor map: how TMA finds boxes of a matrix; a kernel's argument."""

    _fields_ = (("opaque", ctypes.c_uint64 * 16),)


@functools.lru_cache(maxsize=4096)
def tensor_map(address: int, rows: int, columns: int, row_bytes: int, box_rows: int, box_columns: int) -> TensorMap:
    """Boxes of a bf16 matrix [rows, columns] at ``address``, each of 128-byte rows, swizzled by 128 bytes.

    What of a box lies beyond the matrix's edges is read as zeros and not written. ``address`` and ``row_bytes``, from
    one row to the next, are multiples of 16.
    """
    raw = ctypes.create_string_buffer(128 + 63)
    aligned = -(-ctypes.addressof(raw) // 64) * 64
    status = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(aligned), _BFLOAT16, 2, ctypes.c_void_p(address),
        (ctypes.c_uint64 * 2)(columns, rows), (ctypes.c_uint64 * 1)(row_bytes),
        (ctypes.c_uint32 * 2)(box_columns, box_rows), (ctypes.c_uint32 * 2)(1, 1),
        0, _SWIZZLE_128, _PROMOTE_256, 0,
    )  # fmt: skip
    _check(status, "making a TMA tensor map")
    return TensorMap.from_buffer_copy((ctypes.c_char * 128).from_address(aligned))


def shared_memory_limit(device: int) -> int:
    """Bytes of shared memory one block can have, static and dynamic together."""
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)  # type: ignore[attr-defined]


@functools.cache
def read_sources(*files: str) -> str:
    """The files, named from kernels/ on, as one source, in order."""
    return "\n".join((SOURCES / file).read_text(encoding="utf-8") for file in files)


@functools.cache
def compile_kernel(source: str, name: str, defines: tuple[tuple[str, int], ...], device: int) -> CudaKernel:
    """The kernel `name` of `source` for `device`, allowed all the shared memory a block can have there.

    Raises UnsupportedError where this machine cannot compile or run it.
    """
    reason = unavailable_reason()
    if reason is not None:
        raise UnsupportedError(reason)
    properties = torch.cuda.get_device_properties(device)
    feature = "a" if (properties.major, properties.minor) == (9, 0) else ""  # wgmma is a feature of 9.0 alone
    options = [f"--gpu-architecture=sm_{properties.major}{properties.minor}{feature}", "--std=c++17"]
    options += [f"-D{key}={value}" for key, value in defines]
    major, minor = ctypes.c_int(), ctypes.c_int()
    _nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    key = "\0".join((f"nvrtc {major.value}.{minor.value}", *options, source))
    cubin = cubin_cache.cached(key, functools.partial(compile_cubin, source, options))
    module, handle, static = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int()
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # makes torch's context current on this thread
        _check(_driver().cuModuleLoadData(ctypes.byref(module), cubin), "loading a kernel")
        _check(_driver().cuModuleGetFunction(ctypes.byref(handle), module, name.encode()), f"finding kernel {name}")
        _check(_driver().cuFuncGetAttribute(ctypes.byref(static), _STATIC_SHARED, handle), "reading a kernel's size")
        dynamic = shared_memory_limit(device) - static.value
        _check(_driver().cuFuncSetAttribute(handle, _MAX_DYNAMIC_SHARED, dynamic), "reserving shared memory")
    return CudaKernel(handle, properties.major >= 9, device)
