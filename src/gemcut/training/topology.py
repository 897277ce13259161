"""Pods of TPUs, and GPUs, that are not there: their names, their memory, and devices to compile a program for.

libtpu holds the TPU's compiler and describes a pod from its name alone, so that a step is compiled for all of its chips
on a machine without any. What is described can be compiled for and never run.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemcut.errors import ParameterError
from gemcut.files import shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jax.sharding import Mesh

#: The mesh's axes: copies that only average gradients; parts of weights and moments; parts of heads and of the MLP.
AXES = ("replica", "data", "model")
MOST_CHIPS = 1 << 17


@dataclass(frozen=True)
class Chip:
    """A kind of chip: bytes of memory a program may use, axes of its pods' names, and the name jax gives it."""

    memory: int
    axes: int
    device_kind: str
    #: One device a chip: v4 and v5p have two cores that a program sees as one.
    megacore: bool = False


#: What XLA reports as a chip's usable HBM (v5e: 15.75 GiB of 16), by the first word of a pod's name.
CHIPS = {
    "v4": Chip(32 << 30, 3, "TPU v4", megacore=True),
    "v5e": Chip(int(15.75 * 2**30), 2, "TPU v5 lite"),
    "v5p": Chip(95 << 30, 3, "TPU v5p", megacore=True),
    "v6e": Chip(int(31.25 * 2**30), 2, "TPU v6 lite"),
}
_HOST = (2, 2, 1)  # chips of one host of a pod with three axes


@dataclass(frozen=True)
class Pod:
    """``slices`` pods of one shape, such as v5p:16x16x24."""

    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @classmethod
    def parse(cls, text: str, slices: int = 1) -> Pod:
        """From "v5p:16x16x24". Raises ParameterError for a name that is none, or a pod that cannot be."""
        found = re.fullmatch(r"([a-z0-9]+):(\d{1,6}(?:x\d{1,6})*)", text)
        if found is None:
            raise ParameterError(
                f"pod is {shown(text)}; expected a kind and its shape in chips, such as v5p:16x16x24 or v5e:16x16"
            )
        kind, shape = found[1], tuple(map(int, found[2].split("x")))
        chip = CHIPS.get(kind)
        if chip is None:
            raise ParameterError(f"pod {text} is of an unknown kind; expected one of {', '.join(CHIPS)}")
        if len(shape) != chip.axes:
            example = "16x16x24" if chip.axes == 3 else "16x16"
            raise ParameterError(
                f"pod {text} has {len(shape)} numbers; a {kind} pod has {chip.axes}, such as {kind}:{example}"
            )
        pod = cls(kind, shape, slices)
        if not 1 <= pod.chips <= MOST_CHIPS:
            raise ParameterError(f"pod {text} in {slices} slices has {pod.chips:,} chips; expected 1 to {MOST_CHIPS:,}")
        if chip.axes == 3 and any(n % h for n, h in zip(shape, _HOST, strict=True)):
            raise ParameterError(
                f"pod {text} is not made of whole hosts, which have 2x2x1 chips; make the first two even"
            )
        return pod

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def name(self) -> str:
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"

    def __str__(self) -> str:
        return self.name if self.slices == 1 else f"{self.slices} slices of {self.name}"


def parse_mesh(text: str) -> tuple[int, int, int]:
    """(replica, data, model) from "48,16,8". Raises ParameterError."""
    if re.fullmatch(r"\d{1,7},\d{1,7},\d{1,7}", text) is None or 0 in (shape := tuple(map(int, text.split(",")))):
        raise ParameterError(
            f"mesh is {shown(text)}; expected replica,data,model as three numbers from 1, such as 48,16,8"
        )
    return shape[0], shape[1], shape[2]


def check_mesh(shape: tuple[int, int, int], chips: int, slices: int = 1) -> None:
    """Raise ParameterError unless a mesh takes every chip once, with whole replicas in each slice."""
    product = math.prod(shape)
    text = ",".join(map(str, shape))
    if product != chips:
        way = f"; {shape[1]} × {shape[2]} leaves {chips // (shape[1] * shape[2])} replicas"
        fits = chips % (shape[1] * shape[2]) == 0 and chips >= shape[1] * shape[2]
        raise ParameterError(
            f"mesh {text} takes {product:,} chips, there are {chips:,}"
            + (way if fits else "; choose three numbers whose product that is")
        )
    if shape[0] % slices:
        raise ParameterError(
            f"mesh {text} cannot be laid over {slices} slices: {shape[0]} replicas are no multiple of {slices}, and "
            "only replica goes between slices"
        )


def prepare_environment() -> None:
    """Set what libtpu and jax read when they are loaded: no metadata server is asked, no lock file is held, and the
    program that compiles runs on the CPU. Call before the first import of jax."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")  # not what is compiled for: libtpu warns where it is unset
    # Without it a second process dies on the first one's lock file.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def pod_mesh(pod: Pod, shape: tuple[int, int, int]) -> Mesh:
    """The mesh of a pod that is not there.

    Raises ParameterError where libtpu is missing or refuses the pod, or the mesh does not take every chip.
    """
    check_mesh(shape, pod.chips, pod.slices)
    prepare_environment()
    if importlib.util.find_spec("libtpu") is None:
        raise ParameterError(
            "libtpu, the compiler for TPUs, is not installed: pip install 'gemcut[tpu]' (Linux, x86-64)"
        )
    import jax
    from jax.experimental import mesh_utils, topologies
    from jax.sharding import AxisType, Mesh

    options: dict[str, Any] = {"num_slices": pod.slices} if pod.slices > 1 else {}
    if pod.chip.megacore:
        options["chip_config_name"] = "megacore"
    try:
        devices: Sequence[Any] = topologies.get_topology_desc(platform="tpu", topology_name=pod.name, **options).devices
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise ParameterError(f"libtpu knows no pod {pod}: {str(error).splitlines()[0][:160]}") from None
    if len(devices) != pod.chips:
        raise ParameterError(
            f"libtpu describes {pod} with {len(devices):,} devices, not {pod.chips:,}: use another libtpu"
        )
    if pod.slices > 1:
        inside = (shape[0] // pod.slices, *shape[1:])
        grid = mesh_utils.create_hybrid_device_mesh(inside, (pod.slices, 1, 1), devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


@dataclass(frozen=True)
class Gpu:
    """A GPU to compile for: memory in bytes, processors, bytes of L2, clock in GHz, bytes/s, compute capability."""

    memory: int
    processors: int
    l2: int
    clock: float
    bandwidth: int
    capability: int
    device_kind: str


#: From NVIDIA's data sheets; memory is what CUDA reports as total.
GPUS = {
    "h100": Gpu(85_031_714_816, 132, 50 << 20, 1.98, 3_352_000_000_000, 9, "NVIDIA H100"),
    "h200": Gpu(150_121_545_728, 132, 50 << 20, 1.98, 4_800_000_000_000, 9, "NVIDIA H200"),
}


def gpu_mesh(name: str) -> Mesh:
    """A mesh of one GPU that is not there. Its compiler does not refuse a step that is too large: compare yourself.

    Raises ParameterError for an unknown GPU, and where Python, jax or jax's CUDA plugin cannot do it.
    """
    gpu = GPUS.get(name)
    if gpu is None:
        raise ParameterError(f"gpu is {shown(name)}; expected one of {', '.join(GPUS)}")
    if tuple(sys.version_info[:2]) < (3, 12):  # a tuple, so that the type checker reads on
        raise ParameterError(
            f"compiling for a GPU that is not there needs Python 3.12 and jax 0.11 or newer; this is Python "
            f"{sys.version_info.major}.{sys.version_info.minor}: make an environment of a newer Python"
        )
    os.environ.update(JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1", CUDA_VISIBLE_DEVICES="-1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA warns of what is said in one line here
    os.environ.pop("JAX_PLATFORMS", None)
    flags = os.environ.get("XLA_FLAGS", "")
    if "autotune_level" not in flags:  # there is no card to time kernels on
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0".strip()
    import jax

    if jax.__version_info__ < (0, 11):
        raise ParameterError(
            f"compiling for a GPU that is not there needs jax 0.11 or newer, this is {jax.__version__}"
        )
    if not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
        v = jax.__version__
        raise ParameterError(
            "jax's CUDA plugin is not installed: "
            f"pip install --no-deps jax-cuda13-plugin=={v} jax-cuda13-pjrt=={v} (no driver is needed)"
        )
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh

    _name_cuda()
    import numpy as np

    described = topologies.get_topology_desc(
        topology_name=name, platform="cuda", topology="1x1x1", target_config=_target(name, gpu)
    )
    return Mesh(np.array(described.devices).reshape(1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3)


def _name_cuda() -> None:
    """Let jax call the GPU's compiler "cuda" where no GPU is: it looks for a running backend otherwise.

    Upstream: jax-ml/jax#23971 and #28376, both open. To be removed when they are closed.
    """
    from jax._src import xla_bridge

    original = xla_bridge.canonicalize_platform

    def canonicalize(platform: str) -> str:
        try:
            return str(original(platform))
        except RuntimeError:
            if platform not in ("gpu", "cuda"):
                raise
            return "cuda"

    xla_bridge.canonicalize_platform = canonicalize


def _target(name: str, gpu: Gpu) -> str:
    """The GpuTargetConfigProto, as text, that stands for the card."""
    device = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49_152,
        "shared_memory_per_core": 233_472,
        "threads_per_core_limit": 2048,
        "core_count": gpu.processors,
        "fpus_per_core": 128,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65_535,
        "block_dim_limit_z": 65_535,
        "memory_bandwidth": gpu.bandwidth,
        "l2_cache_size": gpu.l2,
        "clock_rate_ghz": gpu.clock,
        "device_memory_size": gpu.memory,
        "shared_memory_per_block_optin": 232_448,
        "registers_per_core_limit": 65_536,
        "registers_per_block_limit": 65_536,
    }
    lines = "\n".join(f"  {key}: {value}" for key, value in device.items())
    return (
        f"gpu_device_info {{\n{lines}\n  cuda_compute_capability {{ major: {gpu.capability} }}\n}}\n"
        'platform_name: "CUDA"\ndnn_version_info { major: 9 minor: 10 }\n'
        f'runtime_version {{ major: 13 }}\ndevice_description_str: "{gpu.device_kind}"\n'
    )
