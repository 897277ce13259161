"""Hopper's warpgroup matrix instruction as device functions, written out for one size each.

Computes: d (+)= a b for 64 x 16 times 16 x columns: the source of a device function
Shapes: a [64, 16] bf16, b [16, columns] bf16 in shared memory, d [64, columns] fp32 in 128 threads' registers
Runs: inlined by linear/gemm.cuh, linear/gated.cu and attention/varlen_hopper.cu; their .py files ask for it
Schedule: one asynchronous wgmma.mma_async (PTX ISA); the caller fences, commits and waits
Invariants: the size is fixed in the instruction, so each size is its own function
"""

from __future__ import annotations


def wgmma_source(name: str, columns: int, *, a_in_registers: bool = False, b_by_rows: bool = False) -> str:
    """``name(d, a, b, accumulate)``: 64 x 16 times 16 x ``columns`` of bf16, added to fp32 ``d`` or in its place.

    ``a`` and ``b`` are descriptors of shared memory, or ``a`` points to four registers. ``b_by_rows``: b's 16 x
    ``columns`` are stored row by row, else column by column.
    """
    count = columns // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    rows = int(b_by_rows)
    if a_in_registers:
        kind, inputs, at = "const u32* a", ", ".join(f'"r"(a[{i}])' for i in range(4)), count + 4
        a, last = "{" + ", ".join(f"%{count + i}" for i in range(4)) + "}", f"1, 1, {rows}"
    else:
        kind, inputs, at = "u64 a", '"l"(a)', count + 1
        a, last = f"%{count}", f"1, 1, 0, {rows}"
    return f"""
__device__ __forceinline__ void {name}(float (&d)[{count}], {kind}, u64 b, bool accumulate) {{
  asm volatile("{{\\n.reg .pred add;\\nsetp.ne.b32 add, %{at + 1}, 0;\\n"
               "wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16 {{{sums}}}, {a}, %{at}, add, {last};\\n}}"
               : {outputs}
               : {inputs}, "l"(b), "r"((u32)accumulate));
}}
"""
