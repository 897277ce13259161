"""A recipe carried out: stages of parts, each part written whole or not at all, so that a run can be taken up again."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemcut.data.document import Document, Dropped
from gemcut.data.executor import Executor, Progress, local
from gemcut.data.folder import run_folder
from gemcut.data.parts import Part, divide
from gemcut.data.readers.base import File, Reader
from gemcut.data.recipe import Recipe, StepSpec, read_recipe
from gemcut.data.steps import Barrier, BaseStep, Flow, batches, run_step
from gemcut.data.store import DocumentWriter, read_documents, write_json
from gemcut.data.tokens.pack import write_shards
from gemcut.errors import DataError

READ = "read"
_REPORT_EVERY = 1 << 20  # bytes of text


@dataclass(frozen=True)
class Stage:
    """Steps between two barriers: ``opening`` applies what it decided, then ``steps``, then ``closing`` collects."""

    number: int
    opening: StepSpec | None
    steps: tuple[StepSpec, ...]
    closing: StepSpec | None


@dataclass(frozen=True)
class Job:
    """One part in one stage, small enough to be sent to another process."""

    out: Path
    recipe: Path
    digest: str
    stage: int
    part: Part
    parts: int

    def __str__(self) -> str:
        names = [file.name for file in self.part.files]
        return (
            f"part {self.part.number} of source {self.part.source} ({', '.join(names[:3])}{', …' * (len(names) > 3)})"
        )


def stages(recipe: Recipe) -> list[Stage]:
    """The recipe's steps, divided at its barriers."""
    out: list[Stage] = []
    opening: StepSpec | None = None
    steps: list[StepSpec] = []
    for spec in recipe.steps:
        if isinstance(spec.step, Barrier):
            out.append(Stage(len(out), opening, tuple(steps), spec))
            opening, steps = spec, []
        else:
            steps.append(spec)
    out.append(Stage(len(out), opening, tuple(steps), None))
    return out


#: Hears of a run: (stage, stages, part, parts that were left when the stage began, bytes of text read from the part,
#: documents read, dropped, is the part done).
Watch = Callable[[int, int, int, int, int, int, int, bool], None]


def run_recipe(
    recipe: Recipe, out: Path, *, workers: int = 1, executor: Executor | None = None, watch: Watch | None = None
) -> None:
    """Carry out ``recipe`` into the folder ``out``, or go on where an earlier run of it ended.

    Parts are carried out by ``workers`` processes of this machine, or by another ``executor``.

    Afterwards ``out/documents`` holds the kept documents, ``out/rejects`` the dropped ones with their reasons,
    ``out/tokens`` the shards where the recipe has [tokens], and ``out/work`` what was counted.

    Raises:
        DataError: a source cannot be read, a step broke its contract, or ``out`` holds something else.
        OSError: the disk is full, or a file cannot be written.
    """
    parts = divide(recipe)
    executor = executor or local(workers)
    with run_folder(recipe, parts, out):
        chain = stages(recipe)
        _prepare(recipe, out)
        for stage in chain:
            waiting = _waiting(recipe, out, stage, parts)
            ears = _Ears(watch, waiting, len(chain))
            executor(run_part, waiting, ears.done, ears.heard)
            if stage.closing is not None:
                _decide(stage, recipe, parts, out)
            if stage.number:
                for part in parts:
                    _documents(out, len(chain), stage.number - 1, part.number).unlink(missing_ok=True)
        if recipe.tokens is not None:
            sources = [(part.source, part.number) for part in parts]
            write_shards(out, sources, recipe.tokens, recipe.mixture, recipe.seed, recipe.digest, executor)


def begin_run(recipe: Recipe, out: Path) -> int:
    """Make ``out`` a run of ``recipe`` and write what all parts need; the number of parts."""
    parts = divide(recipe)
    with run_folder(recipe, parts, out):
        _prepare(recipe, out)
    return len(parts)


def run_share(recipe: Recipe, out: Path, stage: int, task: int, tasks: int) -> int:
    """Carry out every ``tasks``-th part of ``stage`` (from 0), from part ``task`` on; gives how many.

    Others do the same beside it. Parts that are done are left alone. Raises DataError where ``begin_run`` did not make
    ``out``, or the stage before is not finished.
    """
    parts = divide(recipe)
    chosen = _stage(recipe, stage)
    with run_folder(recipe, parts, out, shared=True):
        if stage and not _finished(out, _stage(recipe, stage - 1), parts):
            raise DataError(f"stage {stage} of {out} is not finished; carry out its tasks, and close it, first")
        waiting = _waiting(recipe, out, chosen, parts, task, tasks)
        local(1)(run_part, waiting, lambda number, result: None, lambda *how_far: None)
    return len(waiting)


def close_stage(recipe: Recipe, out: Path, stage: int) -> None:
    """Let the barrier that ends a stage decide. Raises DataError where not all of its parts are done."""
    parts = divide(recipe)
    chosen = _stage(recipe, stage)
    with run_folder(recipe, parts, out, shared=True):
        left = _waiting(recipe, out, chosen, parts)
        if left:
            raise DataError(
                f"{len(left)} of {len(parts)} parts of stage {stage + 1} are not done; carry out its tasks first"
            )
        if chosen.closing is not None:
            _decide(chosen, recipe, parts, out)


def _stage(recipe: Recipe, number: int) -> Stage:
    chain = stages(recipe)
    if not 0 <= number < len(chain):
        raise DataError(f"there is no stage {number + 1}; this recipe has stages 1 to {len(chain)}")
    return chain[number]


def _finished(out: Path, stage: Stage, parts: list[Part]) -> bool:
    closed = stage.closing is None or (_decision(out, stage.number) / "decided.json").exists()
    return closed and all(_stats(out, stage.number, part.number).exists() for part in parts)


def _waiting(recipe: Recipe, out: Path, stage: Stage, parts: list[Part], task: int = 0, tasks: int = 1) -> list[Job]:
    """The parts of a stage that are not done, of every ``tasks``-th from ``task`` on."""
    return [
        Job(out, recipe.path, recipe.digest, stage.number, part, len(parts))
        for part in parts[task::tasks]
        if not _stats(out, stage.number, part.number).exists()
    ]


def _prepare(recipe: Recipe, out: Path) -> None:
    for spec in recipe.steps:
        if not (mark := _prepared(out, spec).with_suffix(".json")).exists():
            spec.step.prepare(_prepared(out, spec))
            write_json(mark, {"step": spec.name})


@dataclass(frozen=True)
class _Ears:
    """Passes on what the executor tells of a stage's jobs."""

    watch: Watch | None
    jobs: list[Job]
    stages: int

    def heard(self, number: int, read: int, documents: int, dropped: int) -> None:
        if self.watch is not None:
            job = self.jobs[number]
            self.watch(job.stage, self.stages, job.part.number, len(self.jobs), read, documents, dropped, False)

    def done(self, number: int, result: tuple[int, int, int]) -> None:
        if self.watch is not None:
            job = self.jobs[number]
            self.watch(job.stage, self.stages, job.part.number, len(self.jobs), *result, True)


def run_part(job: Job, progress: Progress) -> tuple[int, int, int]:
    """Carry out one stage on one part, and write documents, rejects, collected arrays and counts.

    The counts come last: where they are, the part is done. Gives (bytes read, documents read, documents dropped).
    """
    recipe = _recipe(job.recipe, job.digest)
    chain = stages(recipe)
    stage, part = chain[job.stage], job.part
    steps = [spec for spec in stage.steps if spec.sees(part.source)]
    flows: dict[str, Flow] = {}
    totals = [0, 0, 0]
    label = f"{job.stage}-{part.number:05d}"

    with (
        _Rejects(job.out / "rejects" / f"{label}.jsonl.zst", recipe.keep_rejects) as rejects,
        DocumentWriter(_documents(job.out, len(chain), job.stage, part.number)) as writer,
    ):

        def dropped(step: str, item: Dropped, may_write: bool) -> None:
            totals[2] += 1
            rejects.add(step, item, may_write)

        for spec in steps:
            spec.step.notes.clear()
            if _prepared(job.out, spec).exists():
                spec.step.use(_prepared(job.out, spec))
        documents = _watched(_input(job, recipe, stage, steps, flows, dropped), totals, progress)
        for spec in steps:
            flow = flows[spec.name] = Flow()
            documents = run_step(spec.step, spec.name, documents, part.number, job.parts, flow, dropped)
        last = job.stage == len(chain) - 1
        licences: Counter[str] = Counter()
        closing = stage.closing if stage.closing is not None and stage.closing.sees(part.source) else None
        collector = closing.step.collector() if closing is not None and isinstance(closing.step, Barrier) else None
        for batch in batches(documents):
            if collector is not None:
                collector.add(batch)
            for document in batch:
                writer.add(document)
                if last:
                    licences[document.licence] += document.nbytes
        if collector is not None:
            collector.save(_collected(job.out, job.stage, part.number))
    for name, flow in flows.items():
        flow.check(name, part.source)
    counted = [stage.opening, *steps] if stage.opening is not None and stage.opening.sees(part.source) else steps
    write_json(
        _stats(job.out, job.stage, part.number),
        {
            "source": part.source,
            "flows": {name: flow.as_dict() for name, flow in flows.items()},
            "notes": {spec.name: dict(spec.step.notes) for spec in counted if spec is not None and spec.step.notes},
            "examples": rejects.examples,
            "licences": dict(licences),
        },
    )
    return totals[0], totals[1], totals[2]


def _input(
    job: Job,
    recipe: Recipe,
    stage: Stage,
    steps: list[StepSpec],
    flows: dict[str, Flow],
    dropped: Callable[[str, Dropped, bool], None],
) -> Iterator[Document]:
    """The documents that a stage begins with: read from the source, or what its barrier lets through."""
    part = job.part
    if job.stage == 0:
        source = recipe.source(part.source)
        first = _before_texts(steps)
        reader = source.reader.skipping(lambda url: any(step.refuses(url) for step in first))
        flow = flows[READ] = Flow()

        def read(documents: Iterator[Document], rank: int, world_size: int) -> Iterator[Document | Dropped]:
            for file in part.files:
                for item in _read_file(reader, file, source.name, source.licence):
                    flow.taken.add(item if isinstance(item, Document) else item.document)
                    yield item

        return run_step(read, READ, iter(()), part.number, job.parts, flow, dropped)
    documents = read_documents(_documents(job.out, len(stages(recipe)), job.stage - 1, part.number))
    opening = stage.opening
    if opening is None or not opening.sees(part.source):
        return documents
    barrier = opening.step
    assert isinstance(barrier, Barrier)
    barrier.notes.clear()
    flow = flows[opening.name] = Flow()

    def apply(documents: Iterator[Document], rank: int, world_size: int) -> Iterator[Document | Dropped]:
        yield from barrier.apply(documents, rank, _decision(job.out, job.stage - 1))

    return run_step(apply, opening.name, documents, part.number, job.parts, flow, dropped)


def _before_texts(steps: Sequence[StepSpec]) -> list[BaseStep]:
    """The steps that are asked for an address before a text is made: down to the first one that reads texts."""
    found: list[BaseStep] = []
    for spec in steps:
        if isinstance(spec.step, BaseStep):
            found.append(spec.step)
        if not isinstance(spec.step, BaseStep) or spec.step.READS_TEXTS:
            break
    return found


def _read_file(reader: Reader, file: File, source: str, licence: str) -> Iterator[Document | Dropped]:
    """A file's items; one that cannot be opened any more is a dropped record, a full disk is not its fault."""
    try:
        yield from reader.read(file, source, licence)
    except (PermissionError, FileNotFoundError, IsADirectoryError) as error:
        yield Dropped(Document(file.name, source, ""), f"cannot be read: {error.strerror}")


def _watched(documents: Iterator[Document], totals: list[int], progress: Progress) -> Iterator[Document]:
    last = 0
    for document in documents:
        totals[0] += document.nbytes
        totals[1] += 1
        if totals[0] - last > _REPORT_EVERY:
            last = totals[0]
            progress(0, *totals)
        yield document


class _Rejects:
    """Dropped documents of one part in a file; and the first ids of each reason, for the report."""

    SHOWN = 3

    def __init__(self, path: Path, wanted: bool) -> None:
        self._path, self._writer = path, DocumentWriter(path) if wanted else None
        self.examples: dict[str, dict[str, list[str]]] = {}

    def __enter__(self) -> _Rejects:
        if self._writer is not None:
            self._writer.__enter__()
        return self

    def add(self, step: str, item: Dropped, may_write: bool) -> None:
        if not may_write:
            return
        ids = self.examples.setdefault(step, {}).setdefault(item.reason, [])
        if len(ids) < self.SHOWN:
            ids.append(item.document.id)
        if self._writer is not None:
            self._writer.add(item.document, step=step, reason=item.reason)

    def __exit__(self, *error: Any) -> None:
        if self._writer is not None:
            self._writer.__exit__(*error)


def _decide(stage: Stage, recipe: Recipe, parts: list[Part], out: Path) -> None:
    """Let the closing barrier decide, once all parts are there."""
    spec = stage.closing
    assert spec is not None
    assert isinstance(spec.step, Barrier)
    folder = _decision(out, stage.number)
    mark = folder / "decided.json"
    if mark.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    collected = [_collected(out, stage.number, part.number) if spec.sees(part.source) else None for part in parts]
    notes = spec.step.decide(collected, folder)
    write_json(mark, {"step": spec.name, "notes": notes})
    for path in collected:
        if path is not None:
            shutil.rmtree(path, ignore_errors=True)


_RECIPES: dict[tuple[str, str], Recipe] = {}


def _recipe(path: Path, digest: str) -> Recipe:
    """The recipe, read once in each process."""
    key = (os.fspath(path), digest)
    if key not in _RECIPES:
        recipe = read_recipe(path)
        if recipe.digest != digest:
            raise DataError(f"{path} changed while it was run; run again")
        _RECIPES.clear()
        _RECIPES[key] = recipe
    return _RECIPES[key]


def _documents(out: Path, count: int, stage: int, part: int) -> Path:
    last = stage == count - 1
    folder = out / "documents" if last else out / "work" / f"stage-{stage}"
    return folder / f"{part:05d}.jsonl.zst"


def _stats(out: Path, stage: int, part: int) -> Path:
    return out / "work" / f"stage-{stage}" / f"{part:05d}.json"


def _collected(out: Path, stage: int, part: int) -> Path:
    return out / "work" / f"stage-{stage}" / f"{part:05d}.collected"


def _prepared(out: Path, spec: StepSpec) -> Path:
    return out / "work" / "prepared" / spec.name


def _decision(out: Path, stage: int) -> Path:
    return out / "work" / f"stage-{stage}" / "decision"
