"""A trainer's whole state, into a checkpoint and back: what makes a resumed run exact."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from eps_train import graph, guards
from eps_train.checkpoint import Checkpoint
from eps_train.errors import ConfigError
from eps_train.evaluate import Score
from eps_train.optimizer import keep_only, momentum, restore_momentum

if TYPE_CHECKING:
    from eps_train.loop import Trainer


def checkpoint(trainer: Trainer) -> Checkpoint:
    """The network and its record as they are now; what is needed to resume is not in it."""
    return Checkpoint(
        network=trainer.spec,
        state={**trainer.retired, **trainer.model.state_dict()},
        gates=list(trainer.registry.records.values()),
        data=trainer.data.identity,
        config=trainer.config.to_dict(),
        metrics={
            "epoch": trainer.epoch,
            "validation": None if trainer.validated is None else trainer.validated.to_dict(),
            "test": None,
            "seconds": trainer.seconds,
        },
        side_head=None if trainer.side_head is None else dict(trainer.side_head.state_dict()),
    )


def resume_state(trainer: Trainer) -> dict[str, Any]:
    """What `last.pt` holds besides: all that decides how the run goes on."""
    on_gpu = trainer.device.type == "cuda"
    return {
        "epoch": trainer.epoch,
        "step": trainer.step,
        "totals": trainer.totals.tolist(),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(trainer.device) if on_gpu else None,
        "momentum": momentum(trainer.optimizer, trainer.named_parameters()),
        "schedule": trainer.schedule.state(),
        "streaks": trainer.registry.state(),
        "best": None if trainer.best is None else trainer.best.to_dict(),
        "seconds": trainer.seconds,
    }


def restore(trainer: Trainer) -> None:
    """Bring a fresh trainer to where its `last_path` stands.

    Raises:
        FileFormatError: that file, or `best_path`, is missing or damaged.
        ConfigError: it belongs to another run.
    """
    last = Checkpoint.load(trainer.last_path)
    state = last.resume
    if state is None:
        raise ConfigError(f"{trainer.last_path}: holds no state to resume from")
    guards.refuse_other_run(trainer.last_path, last, trainer.config, trainer.data)
    if state["epoch"]:
        Checkpoint.load(trainer.best_path)  # better refused now than after the last epoch
    trainer.registry.restore(last.gates, state["streaks"])
    dead = trainer.registry.dead
    for block in dead:
        trainer.gates[block].latch()
    if dead and trainer.config.live_removal:
        trainer.model = graph.remove_blocks(trainer.model, dead)
    here = trainer.model.state_dict().keys()
    trainer.retired = {n: t for n, t in last.state.items() if n not in here}
    trainer.model.load_state_dict({n: last.state[n] for n in here})
    if trainer.side_head is not None:
        assert last.side_head is not None
        trainer.side_head.load_state_dict(last.side_head)
    trainer.gates = graph.gates(trainer.model)
    keep_only(trainer.optimizer, trainer.named_parameters())
    restore_momentum(trainer.optimizer, trainer.named_parameters(), state["momentum"])
    trainer.schedule.restore(state["schedule"])
    trainer.epoch = trainer.saved = state["epoch"]
    trainer.step = state["step"]
    trainer.totals.copy_(torch.tensor(state["totals"], dtype=trainer.totals.dtype))
    trainer.rng = (state["rng"], state["cuda_rng"])
    trainer.seconds = state["seconds"]
    trainer.best = None if state["best"] is None else Score(**state["best"])
    if last.metrics["validation"] is not None:
        trainer.validated = Score(**last.metrics["validation"])
