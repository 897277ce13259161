"""A run from its file to a checkpoint folder: data → step → metrics, held-out loss, samples, checkpoints → export."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemcut.config import GemmaConfig
from gemcut.data.store import write_json
from gemcut.errors import ParameterError
from gemcut.training.data import batches
from gemcut.training.driver import Driver
from gemcut.training.export import export_folder
from gemcut.training.flops import flops_per_token, flops_utilization, peak_flops
from gemcut.training.importing import HuggingFaceFolder
from gemcut.training.losses import distil, distil_stored, next_token
from gemcut.training.metrics import Metrics
from gemcut.training.mixture import Mixture
from gemcut.training.network import Network
from gemcut.training.placement import Placement, choose_remat, device_bytes
from gemcut.training.placing import gathered
from gemcut.training.program import Memory
from gemcut.training.rundir import MODEL, TOKENIZER, Checkpoints
from gemcut.training.runfile import RunFile, network_config
from gemcut.training.step import Step, check_finite

#: Hears each logged line of metrics.
Watch = Callable[[dict[str, Any]], None]
#: What a batch's rows bring to the step.
KEYS = ("tokens", "segments", "positions", "top_ids", "top_probabilities")
_MARKS = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}


class Trainer:
    """A run in ``folder``, which `rundir.begin` or `rundir.locked` holds.

    ``stopping`` is asked behind each step whether to save and end. Raises DataError, ParameterError, ConfigError and
    CheckpointError for what is wrong with sources, model, teacher or checkpoint.
    """

    def __init__(self, folder: Path, file: RunFile, driver: Driver | None = None) -> None:
        self.folder, self.file = folder, file
        run, model = file.run, file.model
        self.driver = driver or Driver("host")
        self.mixture = Mixture(file, folder / TOKENIZER, self.driver)
        self.tokenizer = self.mixture.tokenizer
        self.config = network_config(file, self.tokenizer.get_vocab_size())
        self.mixture.open(self.config)
        self.devices = Placement(self.config, run.mesh, run.batch, self.driver)
        self._dtype = jnp.dtype(model.compute_dtype)
        self._teacher, self.teacher_weights, self._score = None, None, next_token(model.z_loss)
        if file.teacher is not None and file.teacher.folder:
            self._teacher, self.teacher_weights = self._read_teacher(file.path(file.teacher.folder))
            cap = self._teacher.config.final_logit_softcapping
            self._score = distil(cap, file.teacher.temperature, file.teacher.share)
        elif file.teacher is not None:
            self._score = distil_stored(file.teacher.share)
        # All processes must choose the same: they compile one program together.
        memory = self.devices.least(device_bytes()) if model.remat == "auto" else None
        self.remat = choose_remat(model.remat, self._compiled_bytes, memory)
        self.step = self._make_step(self.remat)
        self.stopping: Callable[[], bool] = lambda: False
        self.placed = self.devices.step(self.step)
        self._loss = jax.jit(self.step.loss, out_shardings=self.devices.own.whole)
        self._likely = jax.jit(self._next, out_shardings=self.devices.own.whole)

    def parameters(self) -> int:
        """How many weights there are."""
        return self.config.num_parameters()

    def _make_step(self, remat: str) -> Step:
        return Step(
            self.devices.network(self.config, self._dtype, self.file.model.attention, remat),
            self.file.optimizer,
            self.file.run.steps,
            score=self._score,
            teacher=self._teacher,
            rows=4096 * self.devices.groups,  # each group has its own
            hold=self.devices.hold(),
        )

    def _compiled_bytes(self, remat: str) -> int:
        step, run = self._make_step(remat), self.file.run
        rows = {name: np.zeros((run.batch * run.micro_batches, *row.shape), row.dtype)
                for name, row in self.mixture.train[0][0][0].items() if name in KEYS}  # fmt: skip
        rows = {name: array[: len(array) // self.driver.processes] for name, array in rows.items()}
        batch = self.devices.batch(rows, run.micro_batches)
        return Memory.of(self.devices.step(step).lower(batch, self.teacher_weights).compile()).needed

    # ---- the loop ------------------------------------------------------------------------------------------------

    def run(self, watch: Watch = lambda line: None, until: int | None = None) -> Path | None:
        """Train to the last step, from the last checkpoint if there is one; gives the exported folder.

        ``until``: save and end after so many steps in all, and give None. ``stopping`` does the same.
        Raises DataError where a loss is not finite or the disk is full, ParameterError where memory is.
        """
        run = self.file.run
        checkpoints = Checkpoints(self.folder, run.keep)
        try:
            with _memory_said():
                state, step = self._train(checkpoints, watch, run.steps if until is None else min(until, run.steps))
            checkpoints.finish()
        finally:
            checkpoints.close()
        return self.export(state["weights"]) if step == run.steps else None

    def _train(self, checkpoints: Checkpoints, watch: Watch, last: int) -> tuple[Any, int]:
        run = self.file.run
        driver, seen = self.driver, run.batch * run.micro_batches
        iterator = batches(
            self.mixture.train,
            seen // driver.processes,
            seed=run.seed,
            workers=run.workers,
            process=driver.process,
            processes=driver.processes,
        )
        state, step, best = self._begin(checkpoints, iterator)
        rate = _Rate(self.config, run.length, seen * run.length, self.devices.mesh.size)
        rows = next(iterator) if step < last else {}
        with contextlib.closing(Metrics(self.folder, step, writes=driver.leads)) as metrics:
            ending = False
            while step < last and not ending:
                rate.begin()
                batch = self.devices.batch({name: rows[name] for name in KEYS if name in rows}, run.micro_batches)
                state, found = self.placed.run(state, batch, self.teacher_weights)
                step += 1
                # The next batch is read while the devices work; the place to go on from is the one before it.
                place, before, rows = _place(iterator), rows, next(iterator)
                check_finite(step, found, partial(self.mixture.documents, before))
                line: dict[str, Any] = {"step": step, **{name: float(value) for name, value in found.items()}}
                del line["finite"]
                line |= rate.after_step()
                if self.mixture.held and run.eval_every and (step % run.eval_every == 0 or step == run.steps):
                    line["held_out"] = self.held_out(state["weights"])
                    mean = float(np.mean(list(line["held_out"].values())))
                    if mean < best:
                        best = mean
                        checkpoints.save(step, state, {"data": place, "best": best}, best=True)
                if run.sample_every and (step % run.sample_every == 0 or step == run.steps):
                    line["sample"] = self.sample(state["weights"], step)
                if step % run.log_every == 0 or "held_out" in line or "sample" in line:
                    metrics.add(line)
                    watch(line)
                ending = self.devices.agreed(self.stopping())
                if step == last or ending or (run.save_every and step % run.save_every == 0):
                    checkpoints.save(step, state, {"data": place, "best": best})
        return state, step

    def _begin(self, checkpoints: Checkpoints, iterator: Any) -> tuple[Any, int, float]:
        """(state, step, best held-out loss) of the last checkpoint, or of a new run."""
        latest = checkpoints.latest()
        if latest is not None:
            state, more = checkpoints.restore(latest, self.placed.state)
            iterator.set_state(more["data"])
            return state, latest, float(more["best"])
        if self.file.model.folder:
            source = HuggingFaceFolder(self.file.path(self.file.model.folder), self.config)
            return self.placed.begin(self.devices.weights(self.config, source.read, np.float32)), 0, float("inf")
        return self.placed.fresh(self.file.run.seed), 0, float("inf")

    def _read_teacher(self, folder: Path) -> tuple[Network, Any]:
        source = HuggingFaceFolder(folder)
        if source.config.vocab_size != self.config.vocab_size:
            raise ParameterError(
                f"the teacher has a vocabulary of {source.config.vocab_size:,}, the student one of "
                f"{self.config.vocab_size:,}; they must be one tokenizer's"
            )
        network = self.devices.network(source.config, self._dtype, self.file.model.attention, "none")
        return network, self.devices.weights(source.config, source.read, self._dtype)

    # ---- what a run shows ----------------------------------------------------------------------------------------

    def held_out(self, weights: Any) -> dict[str, float]:
        """The mean loss of a held-out token in nats (its cross-entropy, whatever is trained on), by source."""
        out = {}
        size = self.file.run.batch
        for name, windows in self.mixture.held.items():
            total = tokens = 0.0
            for at in range(0, len(windows), size):
                rows = [windows[i] for i in range(at, min(at + size, len(windows)))]
                # A last batch that is not full is filled with rows that count for nothing.
                rows += [{**rows[0], "segments": np.zeros_like(rows[0]["segments"])}] * (size - len(rows))
                rows = rows[self.driver.rows(size)]
                batch = self.devices.batch(
                    {key: np.stack([row[key] for row in rows]) for key in KEYS if key in rows[0]}
                )
                _, sums = self._loss(weights, batch, self.teacher_weights)
                total += float(sums["nll"])
                tokens += float(sums["tokens"])
            out[name] = total / max(tokens, 1.0)
        return out

    def _next(self, weights: Any, tokens: jax.Array, count: jax.Array) -> jax.Array:
        """The logits behind the first ``count`` of (rows, length) tokens, of the first row."""
        network = self.step.network
        places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden = network.hidden(weights, tokens, (places < count).astype(jnp.int32), places)
        return network.logits(weights, hidden[0, count - 1])

    def sample(self, weights: Any, step: int, temperature: float = 0.8) -> str:
        """A text that goes on from the run's prompt, drawn with the step's number as the seed."""
        run = self.file.run
        ids = [self.mixture.bos, *self.tokenizer.encode(run.sample_prompt, add_special_tokens=False).ids]
        ids = ids[: run.length - 1]
        prompt, end = len(ids), self.tokenizer.token_to_id("<eos>")
        chance = np.random.default_rng([run.seed, step])
        while len(ids) < run.length and len(ids) < prompt + run.sample_tokens:
            tokens = np.zeros((self.devices.groups, run.length), np.int32)  # a row for each part of a batch
            tokens[:, : len(ids)] = ids
            logits = np.asarray(self._likely(weights, tokens, len(ids)), np.float64) / temperature
            odds = np.exp(logits - logits.max())
            ids.append(int(chance.choice(len(odds), p=odds / odds.sum())))
            if ids[-1] == end:
                break
        text: str = self.tokenizer.decode(ids[1:])
        return text

    def export(self, weights: Any) -> Path:
        """The weights as a Hugging Face folder ``model/`` of the run, with the tokenizer."""
        target = self.folder / MODEL
        if target.exists():
            return target
        model = self.file.model
        beside = self.file.path(model.folder) if model.folder else self.folder / "tokenizer"
        if not model.folder and self.driver.leads:
            beside.mkdir(exist_ok=True)
            own = self.file.path(model.tokenizer) if model.tokenizer else self.folder / TOKENIZER
            (beside / TOKENIZER).write_bytes(own.read_bytes())
            length = self.config.max_position_embeddings
            settings = {**_MARKS, "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": length}
            write_json(beside / "tokenizer_config.json", settings)
        tensors = gathered(self.config, weights)
        return export_folder(target, self.config, tensors, beside=beside, writes=self.driver.leads)


def _place(iterator: Any) -> Any:
    """Where an iterator is, as JSON can hold it."""
    return json.loads(json.dumps(iterator.get_state(), default=int))


@contextlib.contextmanager
def _memory_said() -> Iterator[None]:
    """Turns an error of a device without memory into one line that says what to lower."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise ParameterError(
                f"out of memory ({str(error).splitlines()[0][:160]}); lower batch and raise micro_batches (the same "
                'step), set remat = "full", or lower length'
            ) from None
        raise


class _Rate:
    """Tokens a second, and the share of the devices' peak where that is known.

    The first step compiles, and what stands between two steps (held-out loss, samples, saving) is not counted.
    """

    def __init__(self, config: GemmaConfig, length: int, tokens: int, chips: int) -> None:
        self._tokens, self._flops, self._chips = tokens, flops_per_token(config, length), chips
        self._peak = peak_flops(jax.devices()[0].device_kind)
        self._steps, self._began = 0, 0.0

    def begin(self) -> None:
        self._began = time.perf_counter()

    def after_step(self) -> dict[str, float]:
        self._steps += 1
        if self._steps == 1:
            return {}
        found = {"tokens_per_second": self._tokens / (time.perf_counter() - self._began)}
        if self._peak is not None:
            found["mfu"] = flops_utilization(found["tokens_per_second"], self._flops, self._chips, self._peak)
        memory = jax.local_devices()[0].memory_stats()
        if memory and "peak_bytes_in_use" in memory:
            found["memory_gib"] = memory["peak_bytes_in_use"] / 2**30
        return found
