"""Which kernel a product takes, asked without a GPU: rules of the kernels themselves, for any matrix and GPU."""

from __future__ import annotations

import itertools

import pytest
import torch

from gemcut.kernels.catalogue import KERNELS
from gemcut.kernels.gpu import PRESETS, Gpu
from gemcut.kernels.linear import bf16, cuda, four_bit, int8
from gemcut.kernels.linear.case import LinearCase
from gemcut.kernels.linear.gemv import MAX_FIXED_ROWS, MAX_ROWS, Storage, plan
from gemcut.kernels.linear.routes import route_of, routes
from gemcut.quantization.four_bit import quantize_4bit

STORAGES = {"nf4": four_bit.NESTED, "nf4-flat": four_bit.FLAT, "int8": int8.STORAGE, "bf16": bf16.STORAGE}
MATRICES = [
    (2304, 2048),
    (2304, 9216),
    (3584, 4096),
    (8192, 3584),
    (28672, 3584),
    (4608, 4096),
    (73728, 4608),
    (16, 256),
]
ROWS = [1, 2, 7, 8, 9, 16, 17, 64, 65, 385, 512, 897, 4096]


@pytest.mark.parametrize("gpu", PRESETS.values(), ids=PRESETS)
@pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)
@pytest.mark.parametrize("matrix", MATRICES, ids=str)
def test_every_number_of_rows_has_a_kernel_that_takes_it(matrix: tuple[int, int], storage: Storage, gpu: Gpu) -> None:
    n, k = matrix
    for float_output in (False, True):
        found = routes(storage, n, k, gpu, float_output=float_output)
        ends = [route.up_to_rows for route in found]
        assert ends[-1] is None
        assert all(first < second for first, second in itertools.pairwise(ends[:-1]))  # type: ignore[operator]
        for rows in ROWS:
            route = route_of(found, rows)
            assert route.kernel in KERNELS
            if route is found[0]:  # the GEMV itself plans such a launch
                assert rows <= (MAX_ROWS if plan(storage, MAX_FIXED_ROWS, n, k, gpu) is None else MAX_FIXED_ROWS)
                assert plan(storage, rows, n, k, gpu) is not None
            if route.kernel.endswith("_gemm"):
                assert gpu.capability == (9, 0)
                assert rows > found[0].up_to_rows  # type: ignore[operator]


def test_what_the_measurements_say() -> None:
    """docs/notes/linear-four-bit-gemm.md: 27B's gate and up, fused from 9 rows on an H100; passes on an A100."""
    assert route_of(routes(four_bit.NESTED, 73728, 4608, PRESETS["h100"]), 16).kernel == "four_bit_gemm"
    assert route_of(routes(four_bit.NESTED, 73728, 4608, PRESETS["h100"]), 4096).kernel == "four_bit_dequant"
    assert route_of(routes(four_bit.NESTED, 73728, 4608, PRESETS["a100"]), 16).kernel == "four_bit_gemv"
    assert route_of(routes(four_bit.NESTED, 73728, 4608, PRESETS["a100"]), 65).kernel == "four_bit_dequant"
    assert route_of(routes(bf16.STORAGE, 73728, 4608, PRESETS["a100"]), 5).kernel == "cublas"


@pytest.mark.parametrize("name", ["h100", "a100"])
def test_a_prepared_product_takes_as_many_rows_at_once_as_its_first_route(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small four-bit matrices have a kernel for 16 rows on every GPU; nothing is launched here."""

    class Buffer:
        def announce(self, n: int, k: int, most: int) -> None:
            pass

    n, k = 512, 4096
    monkeypatch.setattr(cuda, "gpu_of", lambda device: PRESETS[name])
    monkeypatch.setattr(cuda, "_buffer", lambda device: Buffer())
    weight = quantize_4bit(torch.randn(n, k, generator=torch.Generator().manual_seed(0)).bfloat16())
    kernel = cuda.prepare(LinearCase((weight,), torch.bfloat16, torch.bfloat16), torch.device("cpu"))
    assert isinstance(kernel, cuda.FewRows)
    seen: list[tuple[str, int]] = []
    for part in ("few", "some", "many"):
        monkeypatch.setattr(kernel, part, lambda x, part=part: seen.append((part, len(x))) or x)
    for rows in (1, 16, 17):
        kernel(torch.zeros(rows, k))
    assert seen == [("few", 1), ("few", 16), ("some", 17)]
