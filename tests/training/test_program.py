"""Collectives read from a small program written here by hand, whose bytes are plain arithmetic."""

from __future__ import annotations

from gemcut.training.program import KINDS, collectives, largest, scattered_sizes, traffic

HLO = """\
HloModule jit_step, entry_computation_layout={(bf16[8,4]{1,0})->bf16[8,4]{1,0}}

%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%a, %b)
}

%all-reduce-scatter.3 (input: bf16[64,32]) -> bf16[4,32] {
  %input = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.9 = bf16[64,32]{1,0:T(8,128)(2,1)} all-reduce(%input), replica_groups=[8,16]<=[128], to_apply=%add
  %place = s32[]{:T(128)} partition-id()
  ROOT %slice = bf16[4,32]{1,0} dynamic-slice(%all-reduce.9, %place), dynamic_slice_sizes={4,32}
}

%body (arg: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %arg = (s32[], bf16[8,4]{1,0}) parameter(0)
  %gathered = (bf16[8,4]{1,0}, bf16[128,4]{1,0}) all-gather-start(%x), replica_groups={{0,1,2,3},{4,5,6,7}}
  %kernel = bf16[8,4]{1,0} custom-call(%x), metadata={op_name="attention",
}}, a kernel's text may begin a line with braces
  %gathered-done = bf16[128,4]{1,0} all-gather-done(%gathered)
  %fused = bf16[4,32]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.3
  ROOT %out = (s32[], bf16[8,4]{1,0}) tuple(%i, %x)
}

%condition (arg: (s32[], bf16[8,4])) -> pred[] {
  %arg = (s32[], bf16[8,4]{1,0}) parameter(0)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%never (arg: f32[100]) -> f32[100] {
  ROOT %unused = f32[100]{0} all-reduce(%arg), replica_groups={}, to_apply=%add
}

ENTRY %main (p: bf16[8,4]) -> bf16[8,4] {
  %p = bf16[8,4]{1,0} parameter(0)
  %loop = (s32[], bf16[8,4]) while(%t), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"23"}}
  %norm = (f32[], f32[3]{0}) all-reduce(%a, %b), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %plain = f32[16,2]{1,0} reduce-scatter(%c), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
  %sent = (s8[10]{0}, s8[10]{0}, u32[], u32[]) collective-permute-start(%d), source_target_pairs={{0,1}}
  %sent-done = s8[10]{0} collective-permute-done(%sent)
  ROOT %r = bf16[8,4]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_collectives_are_counted_by_kind_with_their_bytes_in_one_step() -> None:
    found = traffic(collectives(HLO))
    assert list(found) == list(KINDS)
    in_loop = 23
    assert (found["all-gather"].count, found["all-gather"].calls) == (1, in_loop)
    assert found["all-gather"].nbytes == in_loop * 128 * 4 * 2
    assert (found["reduce-scatter"].count, found["reduce-scatter"].calls) == (2, in_loop + 1)
    # The fused one by what is summed; the plain one by its result times the four that share it.
    assert found["reduce-scatter"].nbytes == in_loop * 64 * 32 * 2 + 4 * 16 * 2 * 4
    assert (found["all-reduce"].count, found["all-reduce"].nbytes) == (1, (1 + 3) * 4)  # nothing calls %never
    assert found["collective-permute"].nbytes == 10
    assert found["all-to-all"].count == 0


def test_the_largest_and_who_takes_part() -> None:
    found = collectives(HLO)
    most = largest(found)
    assert most is not None
    assert (most.kind, most.nbytes, most.chips) == ("reduce-scatter", 64 * 32 * 2, 16)
    gathered = largest(found, "all-gather")
    assert gathered is not None
    assert gathered.chips == 4
    assert largest(found, "all-to-all") is None
    assert scattered_sizes(found) == {64 * 32: 1, 16 * 2: 1}


def test_a_program_without_collectives_has_none() -> None:
    assert collectives("HloModule x\n\nENTRY %main (p: f32[]) -> f32[] {\n  ROOT %p = f32[] parameter(0)\n}\n") == []


def test_a_loop_that_does_not_say_how_often_counts_to_the_number_of_its_condition() -> None:
    known = ', backend_config={"known_trip_count":{"n":"23"}}'
    assert known in HLO
    text = HLO.replace(known, "").replace("  ROOT %less", "  %n = s32[]{:T(128)} constant(7)\n  ROOT %less")
    assert traffic(collectives(text))["all-gather"].calls == 7
