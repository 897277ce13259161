"""Parts as tasks of Ray, over files that all of its machines see."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from gemcut.data.executor import Executor, Progress, Work, is_full, portable, raise_first
from gemcut.errors import DataError, ParameterError


def ray_executor(workers: int) -> Executor:
    """At most ``workers`` tasks of Ray at a time, each with one core.

    The cluster is the one that RAY_ADDRESS names, else one of ``workers`` cores is started on this machine and ended
    with the run. gemcut must be installed on each machine, and recipe, input and output lie on a file system that all
    of them see. Raises ParameterError where Ray is not installed.
    """
    try:
        import ray
    except ImportError:
        raise ParameterError("--executor ray needs Ray: pip install 'gemcut[ray]'") from None

    def run(work: Work, jobs: Sequence[Any], done: Callable[[int, Any], None], progress: Progress) -> None:
        if not ray.is_initialized():
            own = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers, "include_dashboard": False}
            ray.init(log_to_driver=False, logging_level="error", **own)
        _run(ray, work, jobs, workers, done)

    return run


def _run(ray: Any, work: Work, jobs: Sequence[Any], workers: int, done: Callable[[int, Any], None]) -> None:
    task = ray.remote(num_cpus=1, max_retries=1)(_call)
    shared = ray.put(work)
    waiting = deque(range(len(jobs)))
    running: dict[Any, int] = {}
    failed: dict[int, BaseException] = {}
    while waiting or running:
        while waiting and len(running) < workers:
            number = waiting.popleft()
            running[task.remote(shared, jobs[number])] = number
        ready, _ = ray.wait(list(running), num_returns=1)
        for reference in ready:
            number = running.pop(reference)
            try:
                error, result = ray.get(reference)
            except ray.exceptions.WorkerCrashedError:
                error = DataError(
                    f"a worker died twice at {jobs[number]}; with fewer --workers there is more memory for each, and "
                    "finished parts are kept"
                )
            except ray.exceptions.RayError as failure:
                error = DataError(f"Ray could not carry out {jobs[number]}: {str(failure).splitlines()[0]}")
            if error is None:
                done(number, result)
                continue
            if is_full(error):
                for other in running:
                    ray.cancel(other, force=True)
                raise error
            failed[number] = error
    raise_first(failed, len(jobs))


def _call(work: Work, job: Any) -> tuple[Exception | None, Any]:
    """(error, result): Ray would wrap an error in one of its own, with a trace of many lines."""
    try:
        return None, work(job, _silent)
    except Exception as error:
        return portable(error), None


def _silent(number: int, *how_far: int) -> None:
    pass
