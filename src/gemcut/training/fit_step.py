"""The step of a run on a mesh, traced from shapes alone: what ``fit`` compiles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gemcut.config import GemmaConfig
from gemcut.errors import ParameterError
from gemcut.training.losses import distil
from gemcut.training.network import Network
from gemcut.training.optimizer import OptimizerConfig
from gemcut.training.parameters import shapes
from gemcut.training.placed import PlacedStep, placed
from gemcut.training.sharding import Shardings, check_batch
from gemcut.training.step import Step

if TYPE_CHECKING:
    from gemcut.training.fit import Plan


def sharded_network(config: GemmaConfig, shardings: Shardings, attention: str, remat: str) -> Network:
    """The network of ``config`` with every activation where ``shardings`` puts it."""
    return Network(
        config,
        attention=attention,
        remat=remat,
        lookup=shardings.lookup,
        constrain=shardings.constrain,
        per_device=shardings.per_device,
        groups=shardings.groups,
    )


def lower(plan: Plan, mesh: Mesh) -> Any:
    """The step of ``plan`` on ``mesh``, traced and ready to compile. Raises ParameterError where sizes disagree."""
    check_batch(plan.batch, dict(mesh.shape))
    if plan.seq % plan.pieces:
        raise ParameterError(f"a sequence of {plan.seq} tokens cannot be cut into {plan.pieces} pieces of the loss")
    own = Shardings(plan.config, mesh)
    teacher: Network | None = None
    held = None
    if plan.teacher is not None:
        if plan.teacher.vocab_size != plan.config.vocab_size:
            raise ParameterError(
                f"the teacher has a vocabulary of {plan.teacher.vocab_size:,} tokens, the student of "
                f"{plan.config.vocab_size:,}; choose a teacher of the same family"
            )
        theirs = Shardings(plan.teacher, mesh)
        teacher = sharded_network(plan.teacher, theirs, plan.attention, "full")
        held = placed(shapes(plan.teacher, jnp.bfloat16), theirs.weights())
    step = Step(
        sharded_network(plan.config, own, plan.attention, plan.remat),
        OptimizerConfig(),
        steps=1_000_000,
        score=distil(plan.teacher.final_logit_softcapping) if plan.teacher is not None else None,
        teacher=teacher,
        rows=plan.batch * plan.seq // plan.pieces,
        hold=own.hold,
    )
    on_mesh = PlacedStep(step, own)
    rows = jax.ShapeDtypeStruct((1, plan.batch, plan.seq), jnp.int32, sharding=on_mesh.rows)
    return on_mesh.lower({"tokens": rows, "segments": rows, "positions": rows}, held)
