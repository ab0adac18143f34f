"""A trainer's whole state, into a checkpoint and back: what makes a resumed run exact."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from eps_train import graph, guards
from eps_train.checkpoint import Checkpoint
from eps_train.deaths import read_counters, write_counters
from eps_train.errors import ConfigError
from eps_train.evaluate import Score
from eps_train.optimizer import momentum, restore_momentum

if TYPE_CHECKING:
    from eps_train.loop import Trainer


def save_epoch(trainer: Trainer, *, best: bool) -> None:
    """Write the state at the end of an epoch: `last_path`, and before it what else is wanted."""
    written, state = checkpoint(trainer), resume_state(trainer)

    def write() -> None:
        if best:
            written.save(trainer.best_path)
        written.resume = state
        if trainer.kept is not None:
            trainer.kept.write(written)
        written.save(trainer.last_path)
        if trainer.kept is not None:
            trainer.kept.rotate(trainer.epoch)

    trainer.group.lead(write)


def save_midway(trainer: Trainer) -> None:
    """Write `last_path` in the middle of an epoch."""
    written = checkpoint(trainer)
    written.resume = resume_state(trainer)

    def write() -> None:
        written.save(trainer.last_path)

    trainer.group.lead(write)


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
            "started_from": trainer.started_from,
        },
        side_head=None if trainer.side_head is None else dict(trainer.side_head.state_dict()),
    )


def resume_state(trainer: Trainer) -> dict[str, Any]:
    """What `last.pt` holds besides: all that decides how the run goes on.

    Every process has its part in it, so that all of them have to call this.
    """
    return {
        "processes": trainer.group.gather(_own_state(trainer)),
        "epoch": trainer.epoch,
        "step": trainer.step,
        "momentum": momentum(trainer.optimizer, trainer.named_parameters()),
        "precision": trainer.take_step.precision.state(),
        "schedule": trainer.schedule.state(),
        "streaks": trainer.registry.state(),
        "lead": None if trainer.lead is None else trainer.lead.state(),
        "best": None if trainer.best is None else trainer.best.to_dict(),
        "seconds": trainer.seconds,
    }


def _own_state(trainer: Trainer) -> dict[str, Any]:
    """What differs between the processes of a run, in the middle of an epoch."""
    on_gpu = trainer.device.type == "cuda"
    return {
        "totals": trainer.totals.tolist(),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(trainer.device) if on_gpu else None,
        "gates": {block: tuple(found) for block, found in read_counters(trainer.gates).items()},
    }


def _restore_own_state(trainer: Trainer, state: dict[str, Any]) -> None:
    trainer.totals.copy_(torch.tensor(state["totals"], dtype=trainer.totals.dtype))
    trainer.rng = (state["rng"], state["cuda_rng"])
    write_counters(trainer.gates, state["gates"])


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
    guards.refuse_other_count(trainer.last_path, len(state["processes"]), trainer.group.size)
    if state["epoch"]:
        Checkpoint.load(trainer.best_path)  # better refused now than after the last epoch
    trainer.registry.restore(last.gates, state["streaks"])
    dead = trainer.registry.dead
    for block in dead:
        trainer.gates[block].latch()
    if dead and trainer.config.live_removal:
        trainer.adopt(graph.remove_blocks(trainer.model, dead))
    here = trainer.model.state_dict().keys()
    trainer.retired = {n: t for n, t in last.state.items() if n not in here}
    trainer.model.load_state_dict({n: last.state[n] for n in here})
    if trainer.side_head is not None:
        assert last.side_head is not None
        trainer.side_head.load_state_dict(last.side_head)
    restore_momentum(trainer.optimizer, trainer.named_parameters(), state["momentum"])
    trainer.schedule.restore(state["schedule"])
    if trainer.lead is not None:
        trainer.lead.restore(state["lead"])
    trainer.epoch = trainer.saved = state["epoch"]
    trainer.step = state["step"]
    _restore_own_state(trainer, state["processes"][trainer.group.rank])
    trainer.take_step.precision.restore(state["precision"])
    trainer.seconds = state["seconds"]
    trainer.best = None if state["best"] is None else Score(**state["best"])
    trainer.started_from = last.metrics["started_from"]
    trainer.resumed_otherwise = guards.changes(
        trainer.last_path, last, trainer.config, trainer.data
    )
    if last.metrics["validation"] is not None:
        trainer.validated = Score(**last.metrics["validation"])
