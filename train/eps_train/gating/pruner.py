"""Pruning inside any training loop: gates, dead blocks, their removal, and the state to resume."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from eps_core.errors import ConfigError, FileFormatError, GraphError
from eps_train.data import dataset
from eps_train.data.inputs import Batch, ImageInputs
from eps_train.gating import parity, rewriting
from eps_train.gating.controller import EpsilonController
from eps_train.gating.costs import count_costs, make_timer, measure_latency
from eps_train.gating.gate import EpsilonGate
from eps_train.gating.pruning_state import CRITERIA, BlockScores, BlockTracker
from eps_train.gating.targets import BlockCosts, Target
from eps_train.models import stored
from eps_train.models.spec import GraphSpec, NetworkSpec, count_parameters
from eps_train.training.checkpoint import Checkpoint
from eps_train.training.distributed import ALONE, Group
from eps_train.training.evaluate import answers

SETTLE = 0.7  # share of the run after which no further block is chosen, so that the rest settles

Metric = Callable[[nn.Module], float]
"""Quality of a network in evaluation mode, 0 to 1; higher is better."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneSummary:
    """What an epoch showed.

    Attributes:
        epoch: 1-based.
        died: blocks that were latched at its end, in network order.
        discarded: blocks whose gate was closed, averaged over the steps (a dead block counts as 1).
        epsilon: largest threshold of the epoch.
        accuracy: of the network that would ship, on the held-out data; None: not measured.
        scores: importance of the live blocks by the criterion; None: their response.
    """

    epoch: int
    died: tuple[str, ...]
    discarded: float
    epsilon: float
    accuracy: float | None
    scores: Mapping[str, float] | None


class GraphPruner:
    """Prunes a graph whose gates, if any, are in place, in a loop that calls it between epochs.

    Epochs begin with :meth:`begin_epoch` and end with :meth:`judge_epoch`.

    Args:
        graph, spec: the network, and how to build it again.
        stages: stage by block (`rewriting.stages`).
        controller: chooses the blocks and epsilon; without it `epsilon`, a function from the
            0-based epoch, is that of all gates.
        seed: of the criterion ``random``.
        group: the processes of the run; None: those of torch's default group, if there is one.

    The other arguments, and the attributes, are those of :class:`BlockPruner`.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        spec: NetworkSpec,
        stages: Mapping[str, str],
        *,
        controller: EpsilonController | None,
        epsilon: Callable[[int], float],
        patience: int,
        criterion: str,
        relative: bool,
        live_removal: bool,
        seed: int,
        group: Group | None,
    ) -> None:
        self.model, self.spec, self.stages = graph, spec, stages
        self.gates, self._relative = rewriting.gates(graph), relative
        for gate in self.gates.values():
            gate.relative = relative
        self.tracker = BlockTracker(spec.gated, patience=patience)
        self.controller, self._epsilon = controller, epsilon
        self.scores: BlockScores | None = None
        if criterion != "response":
            self.scores = BlockScores(graph, criterion, seed=seed)
        self.live_removal, self._group = live_removal, group
        self.removed_tensors: dict[str, Tensor] = {}  # of removed blocks, for checkpoints
        self.epoch = self.steps = 0
        # DDP must not send one process's records to all others.
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            graph, self.local_buffers()
        )

    # -- Epochs

    def step(self) -> None:
        """Count a step of the optimizer; call it after each. Does not wait for the device."""
        self.steps += 1

    def begin_epoch(self) -> None:
        """Set the thresholds of the current epoch."""
        for block, epsilon in self.thresholds(self.epoch).items():
            self.gates[block].set_epsilon(epsilon)

    def judge_epoch(
        self,
        heldout: Iterable[Batch],
        *,
        optimizer: Optimizer | Sequence[Optimizer] = (),
        averaged: nn.Module | None = None,
        metric: Metric | None = None,
    ) -> PruneSummary:
        """:meth:`BlockPruner.end_epoch` without the thresholds of the next epoch."""
        optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        ships = self.model if averaged is None else self._copy_in(averaged)
        if isinstance(heldout, Iterator):
            heldout = list(heldout)  # it is read more than once
        self._refuse_disorder(heldout, optimizers)
        group, epoch = self.group, self.epoch
        scores = None if self.scores is None else self.scores.read(group.add)
        thresholds = self.thresholds(epoch)
        discarded = self.tracker.record_epoch(self.gates, thresholds, group)
        limited = self.controller is not None and self.controller.max_accuracy_drop is not None
        if metric is None and limited:
            metric = _accuracy_on(heldout)
        accuracy = None
        with self._chosen_blocks_shut(rewriting.gates(ships)):
            died = self.tracker.latch(
                rewriting.gates(ships),
                lambda: len(answers(ships, heldout)[0]),
                epoch=epoch,
                group=group,
            )
            for block in died:
                self.gates[block].latch()
            if died and self.live_removal:
                self._remove(died, optimizers, ships)
            if metric is not None:
                measured = metric
                accuracy = group.lead(lambda: measured(ships))
        self.epoch, self.steps = epoch + 1, 0
        if self.controller is not None:
            self.controller.observe(
                epoch,
                self.tracker.records.values(),
                kept=self.cost(),
                accuracy=1.0 if accuracy is None else accuracy,
                scores=scores,
            )
        return PruneSummary(
            epoch=self.epoch,
            died=died,
            discarded=discarded,
            epsilon=max(thresholds.values(), default=0.0),
            accuracy=accuracy,
            scores=scores,
        )

    def thresholds(self, epoch: int) -> dict[str, float]:
        """Epsilon of every gate of the network in the 0-based `epoch`; 0 holds a gate open."""
        if self.controller is not None:
            return {block: self.controller.threshold(block) for block in self.gates}
        return dict.fromkeys(self.gates, self._epsilon(epoch))

    def _refuse_disorder(self, heldout: Iterable[Batch], optimizers: Sequence[Optimizer]) -> None:
        """Raise ConfigError when the calls so far do not make an epoch of this network."""
        if not self.steps:
            raise ConfigError(
                "end_epoch(): no step since the epoch began; call pruner.step() after each"
                " optimizer.step()"
            )
        if isinstance(heldout, Sized) and not len(heldout):
            raise ConfigError("heldout: is empty; give it images to judge blocks by")
        live = [gate for block, gate in self.gates.items() if block not in self.tracker.dead]
        if live and not min(torch.stack([gate.steps for gate in live]).tolist()):
            raise ConfigError(
                "end_epoch(): the gates saw no forward pass in training mode; train pruner.model,"
                " after pruner.model.train()"
            )
        held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
        if optimizers and not any(id(p) in held for p in self.model.parameters()):
            raise ConfigError(
                "end_epoch(optimizer=): it holds no parameter of the network; make it from"
                " pruner.model.parameters()"
            )

    @contextmanager
    def _chosen_blocks_shut(self, gates: Mapping[str, EpsilonGate]) -> Iterator[None]:
        """Evaluate the blocks that the controller prunes as they are trained: shut."""
        chosen = self.controller.chosen if self.controller is not None else ()
        for block in chosen:
            gates[block].latch()
        try:
            yield
        finally:
            for block in chosen:
                if block not in self.tracker.dead:
                    gates[block].unlatch()

    # -- Removal

    def _remove(
        self, blocks: Iterable[str], optimizers: Sequence[Optimizer], *networks: fx.GraphModule
    ) -> None:
        """Remove blocks from the network, its averages and the optimizers."""
        before, parameters = self.model.state_dict(), list(self.model.parameters())
        for network in {id(network): network for network in (self.model, *networks)}.values():
            rewriting.remove_blocks_in_place(network, blocks)
        gone = before.keys() - self.model.state_dict().keys()
        # On the CPU: on a GPU they would keep the memory that their removal frees.
        self.removed_tensors |= {
            name: tensor.to("cpu", copy=True) for name, tensor in before.items() if name in gone
        }
        kept = {id(parameter) for parameter in self.model.parameters()}
        for optimizer in optimizers:
            drop_parameters(optimizer, [p for p in parameters if id(p) not in kept])
        self.gates = rewriting.gates(self.model)
        if self.scores is not None:
            self.scores.observe(self.model)

    def _copy_in(self, averaged: nn.Module) -> fx.GraphModule:
        """The copy of the network in an average of it."""
        for module in averaged.modules():
            if isinstance(module, fx.GraphModule) and (
                rewriting.gates(module).keys() == self.gates.keys()
            ):
                return module
        raise ConfigError(
            "averaged=: holds no copy of the network with its gates; make it from pruner.model, as"
            " in torch.optim.swa_utils.AveragedModel(pruner.model)"
        )

    # -- The network

    def shipped(self) -> fx.GraphModule:
        """The network without its dead blocks; shares modules and tensors with :attr:`model`."""
        if self.live_removal:
            return self.model
        return rewriting.remove_blocks(self.model, self.tracker.dead)

    def cost(self) -> float:
        """Cost of the network without its dead blocks; of a latency, as predicted."""
        assert self.controller is not None
        if self.controller.costs.currency == "parameters":
            return count_parameters(self.shipped())
        return self.controller.costs.without(self.tracker.dead)

    @property
    def remaining(self) -> float | None:
        """Share of the cost that is left; None without a target."""
        return None if self.controller is None else self.cost() / self.controller.costs.whole

    @property
    def group(self) -> Group:
        """The processes that train together."""
        if self._group is not None:
            return self._group
        # Not kept: a gloo group that outlives `destroy_process_group()` aborts the process.
        together = dist.is_available() and dist.is_initialized()
        return Group(dist.group.WORLD) if together else ALONE

    def local_buffers(self, prefix: str = "") -> list[str]:
        """Names of the gates' buffers, which each process has for itself.

        DDP ignores them in `pruner.model`. Around another module, pass them, with the prefix of the
        network in it, to DDP's `_set_params_and_buffers_to_ignore_for_model`.
        """
        paths = [str(node.target) for node in rewriting.gate_nodes(self.model)]
        return [
            f"{prefix}{path}.{name}"
            for path in paths
            for name, _ in self.model.get_submodule(path).named_buffers()
        ]

    # -- Resuming

    def state_dict(self) -> dict[str, Any]:
        """All that decides how pruning continues, beside the state dict of :attr:`model`.

        Of tensors and plain data, for `torch.save`. Each process has its own.
        """
        return {
            "epoch": self.epoch,
            "steps": self.steps,
            "tracker": self.tracker.state_dict(),
            "controller": self.controller and self.controller.state_dict(),
            "scores": self.scores and self.scores.state_dict(),
            "gates": {
                block: {name: t.to("cpu", copy=True) for name, t in gate.state_dict().items()}
                for block, gate in self.gates.items()
            },
            "removed": dict(self.removed_tensors),
        }

    def load_state_dict(
        self,
        state: Mapping[str, Any],
        *,
        optimizer: Optimizer | Sequence[Optimizer] = (),
        averaged: nn.Module | None = None,
    ) -> None:
        """Continue as the pruner that gave `state`, in a new one of the same network.

        Call it before the state dicts of network, averages and optimizers are loaded, because it
        removes their blocks that were dead.

        Raises:
            ConfigError: `state` belongs to another network or target.
        """
        optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        known, found = self.tracker.records.keys(), state["tracker"]["records"].keys()
        if known != found:
            other = next(iter(found ^ known))
            raise ConfigError(f"load_state_dict(): of another network, which differs in {other}")
        if (self.controller is None) != (state["controller"] is None) or (
            (self.scores is None) != (state["scores"] is None)
        ):
            raise ConfigError(
                "load_state_dict(): of a pruner with another target or criterion; make it with the"
                " same arguments"
            )
        networks = [] if averaged is None else [self._copy_in(averaged)]
        self.tracker.load_state_dict(dict(state["tracker"]))
        dead = self.tracker.dead
        if alive := [block for block in known if block not in {*dead, *self.gates}]:
            raise ConfigError(
                f"load_state_dict(): {alive[0]} is already removed; make a new pruner"
            )
        present = [block for block in dead if block in self.gates]
        for gates in (self.gates, *map(rewriting.gates, networks)):
            for block in present:
                gates[block].latch()
        if present and self.live_removal:
            self._remove(present, optimizers, *networks)
        self.removed_tensors = dict(state["removed"])
        self.epoch, self.steps = state["epoch"], state["steps"]
        if self.controller is not None:
            self.controller.load_state_dict(state["controller"])
        if self.scores is not None:
            self.scores.load_state_dict(state["scores"])
        for block, gate in self.gates.items():
            gate.load_state_dict(state["gates"][block])


class BlockPruner(GraphPruner):
    """Removes residual blocks that contribute nothing from a network, while any loop trains it.

    ::

        pruner = BlockPruner(model, target=Parameters(0.5), example=images)
        model = pruner.model
        for epoch in range(20):
            for batch in loader:
                ...  # forward, backward, optimizer.step()
                pruner.step()
            pruner.end_epoch(val_loader, optimizer=optimizer)

    Gates judge every forward pass in training mode. Between epochs, blocks whose gate was closed on
    every step of `patience` epochs, and whose response on held-out data is below epsilon, are
    removed from the network and the optimizer. `model` stays the same object.

    Args:
        model: a network that torch.fx can trace, on its device, not wrapped (DDP, torch.compile).
            Its modules and tensors become those of :attr:`model`.
        example: a batch of inputs `[N, C, H, W]`, normalised as in training. Its shape is used.
        target: share of a cost to keep; epsilon is adjusted to reach it.
        epsilon: threshold of all gates, in units of the response, instead of a target; or
            a function from the 0-based epoch to it. At 0 all gates are open.
        epochs: length of the training, over which the target is approached.
        max_accuracy_drop: with a target, choose further blocks only while the held-out accuracy is
            at most this many percentage points below its best.
        patience: consecutive epochs that a gate must be closed on every step.
        criterion: with a target, which blocks go first; see `pruning_state.BlockScores`.
        relative: whether the response is relative to the block's input (`EpsilonGate.relative`).
        live_removal: remove dead blocks between epochs. Otherwise they stay, closed, until the
            network is compacted: for wrappers that hold on to the parameters.
        mean, std: normalisation of the inputs as of torchvision's `Normalize`, one value or one per
            channel; by default pixels are 0 to 1. Only files and bundles need it.
        classes: names of the classes, for files and bundles; by default their numbers.
        fit: how your transform makes images of another aspect ratio fit, for files and bundles:
            `crop` at the center, or `letterbox` on gray (114).

    Attributes:
        model: the network with gates; train it as usual.
        epoch: epochs done.
        steps: steps done of the current epoch.

    Raises:
        GraphError: `model` cannot be traced, or has no residual addition.
        ConfigError: an argument cannot be used, or the target cannot be met.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        example: Tensor,
        target: Target | None = None,
        epsilon: float | Callable[[int], float] | None = None,
        epochs: int = 20,
        max_accuracy_drop: float | None = None,
        patience: int = 2,
        criterion: str = "response",
        relative: bool = False,
        live_removal: bool = True,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
        classes: Sequence[str] | None = None,
        fit: str = "crop",
    ) -> None:
        if isinstance(model, (DistributedDataParallel, nn.DataParallel)) or (
            hasattr(model, "_orig_mod")
        ):
            raise ConfigError(
                f"BlockPruner: takes the network itself, not {type(model).__name__}; wrap or"
                " compile pruner.model instead"
            )
        if (target is None) == (epsilon is None):
            raise ConfigError("BlockPruner: give either target= or epsilon=")
        if isinstance(epsilon, (int, float)) and not 0 < epsilon < math.inf:
            raise ConfigError(f"epsilon={epsilon}: must be finite and above 0")
        if patience < 2 or epochs < 1:
            raise ConfigError("BlockPruner: patience= must be at least 2, epochs= at least 1")
        if criterion not in CRITERIA:
            raise ConfigError(f"criterion={criterion!r}: choose one of {', '.join(CRITERIA)}")
        self.inputs = ImageInputs.of(example, mean=mean, std=std, classes=classes, fit=fit)
        shape = self.inputs.shape
        graph = _with_gates(model, shape)
        stages = rewriting.stages(graph, shape)
        controller = None
        if target is not None:
            costs = _costs(graph, target, self.inputs)
            if costs.least(stages) > target.share:
                raise ConfigError(
                    f"{target} cannot be met: every stage keeps a block, and that leaves"
                    f" {costs.least(stages):.0%} of the {target.unit}"
                )
            controller = EpsilonController(
                target=target,
                costs=costs,
                epochs=epochs,
                end=max(2, round(SETTLE * epochs)),
                stages=stages,
                patience=patience,
                max_accuracy_drop=max_accuracy_drop,
                criterion=criterion,
            )
        super().__init__(
            graph,
            GraphSpec(
                family="own",
                arguments={},
                gated=tuple(rewriting.gates(graph)),
                graph=copy.deepcopy(graph).cpu(),
            ),
            stages,
            controller=controller,
            epsilon=epsilon if callable(epsilon) else lambda epoch: epsilon or 0.0,
            patience=patience,
            criterion=criterion,
            relative=relative,
            live_removal=live_removal,
            seed=0,
            group=None,
        )
        self.begin_epoch()

    def end_epoch(
        self,
        heldout: Iterable[Batch],
        *,
        optimizer: Optimizer | Sequence[Optimizer] = (),
        averaged: nn.Module | None = None,
        metric: Metric | None = None,
    ) -> PruneSummary:
        """Judge the epoch that ended, remove the blocks that died, and set epsilon for the next.

        Args:
            heldout: batches that are not trained on: inputs, or inputs and labels.
            optimizer: the optimizers of the network; they lose the parameters of removed blocks.
            averaged: an average of the network's weights that ships in its place
                (`AveragedModel(pruner.model)`). Held-out data is judged by it, and it loses the
                same blocks.
            metric: quality of a network on held-out data, for `max_accuracy_drop`; by default top-1
                accuracy on `heldout`.

        Raises:
            ConfigError: no step was taken, the network was not trained in training mode, `heldout`
                is empty, or an argument does not belong to the network.
        """
        summary = self.judge_epoch(heldout, optimizer=optimizer, averaged=averaged, metric=metric)
        self.begin_epoch()
        return summary

    # -- Files

    def checkpoint(self, averaged: nn.Module | None = None) -> Checkpoint:
        """Return the network and the evidence about its blocks, as `eps-compact` takes them.

        Args:
            averaged: as in :meth:`end_epoch`; its weights are taken.
        """
        network = self.model if averaged is None else self._copy_in(averaged)
        blank = torch.zeros((1, *self.inputs.shape))
        classes = answers(network, [blank])[0].shape[1]
        state = {**self.removed_tensors, **network.state_dict()}
        return Checkpoint(
            network=self.spec,
            state={name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()},
            gates=list(self.tracker.records.values()),
            data=self.inputs.identity(classes),
            config={
                "epsilon": max(self.thresholds(self.epoch).values(), default=0.0),
                "relative_epsilon": self._relative,
            },
            metrics={"epoch": self.epoch, "validation": None, "test": None, "started_from": None},
        )

    def save(
        self,
        path: str | Path,
        *,
        network: str | None = None,
        data: str | None = None,
        data_root: str | Path | None = None,
        averaged: nn.Module | None = None,
    ) -> None:
        """Write a checkpoint for `eps-compact`, which runs without this program.

        Args:
            path: of the file, `ckpt.pt` for example.
            network: what builds the network, as `eps-train --model` takes it:
                `torchvision:resnet18`, `timm:resnet26d` or `package.module:factory`. Without it
                the graph itself is saved, of which all layers and functions must be torch's.
            data: the data set, as `eps-train --dataset` takes it; its held-out and test images are
                used by `eps-compact` and `eps-deploy`. Without it use `eps-compact --no-data`.
            data_root: folder of its files.
            averaged: as in :meth:`end_epoch`; its weights are saved.

        Raises:
            ConfigError: `network` does not build this network; without it, the graph has code that
                a file cannot hold.
            DataError: the data set is missing or damaged.
        """
        checkpoint = self.checkpoint(averaged)
        channels, *size = self.inputs.shape
        if network is None:
            try:
                checkpoint.network = NetworkSpec.from_dict(self.spec.to_dict())
            except stored.NotStorable as error:
                raise ConfigError(
                    f"save(): {error}; give network='package.module:factory'"
                ) from None
        else:
            checkpoint.network = NetworkSpec.parse(
                network,
                in_channels=channels,
                classes=len(checkpoint.data.classes),
                image_size=(size[0], size[1]),
            )
        reason = self._difference(checkpoint, self.model if averaged is None else averaged)
        if reason is not None:
            raise ConfigError(
                f"save(network={network!r}): does not build the network that was trained ({reason})"
            )
        if data is not None:
            root = None if data_root is None else Path(data_root)
            found = dataset.load(
                data, root, image_size=(size[0], size[1]), fit=self.inputs.fit
            ).identity
            ours = checkpoint.data
            theirs = found.outline
            if (theirs.shape, theirs.classes) != (ours.input_shape, len(ours.classes)):
                raise ConfigError(
                    f"save(data={data!r}): has images {theirs.shape} in {theirs.classes} classes,"
                    f" the network {ours.input_shape} and {len(ours.classes)}"
                )
            checkpoint.data = replace(found, mean=ours.mean, std=ours.std)
        checkpoint.save(Path(path))

    def _difference(self, checkpoint: Checkpoint, trained: nn.Module) -> str | None:
        """How the network of a checkpoint differs from the trained one; None if it does not."""
        if checkpoint.network.gated != self.spec.gated:
            return "it has other residual blocks"
        try:
            built = checkpoint.build_gated()
        except (FileFormatError, GraphError) as error:
            return str(error)
        device = next(self.model.parameters()).device
        generator = torch.Generator().manual_seed(0)
        batch = torch.rand((parity.BATCH, *self.inputs.shape), generator=generator)
        ours, theirs = (answers(n, [batch])[0] for n in (trained, built.to(device)))
        if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4):
            return "it returns other logits with the same weights"
        return None


def drop_parameters(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Remove parameters and their state from an optimizer of any class."""
    gone = {id(parameter): parameter for parameter in parameters}
    for group in optimizer.param_groups:
        stays = [id(parameter) not in gone for parameter in group["params"]]
        for key in ("params", "param_names"):  # the latter where parameters were given with names
            if key in group:
                group[key] = [v for v, keep in zip(group[key], stays, strict=True) if keep]
    for parameter in gone.values():
        optimizer.state.pop(parameter, None)


# -- Arguments


def _with_gates(model: nn.Module, shape: tuple[int, int, int]) -> fx.GraphModule:
    """Insert gates, and compare the networks by running them."""
    blank = torch.zeros((parity.BATCH, *shape))
    example = parity.example_for(model, shape)
    # One that does not run raises an error that says why.
    gated = rewriting.insert_gates(model, example=blank if example is None else example)
    return rewriting.without_broadcasts(gated, rewriting.broadcasts(gated, blank))


def _costs(graph: fx.GraphModule, target: Target, inputs: ImageInputs) -> BlockCosts:
    """Count the costs of a network and of its blocks, or time them."""
    if target.currency != "latency":
        return count_costs(graph, inputs.shape, target.currency)
    blank = torch.zeros((1, *inputs.shape))
    identity = inputs.identity(answers(graph, [blank])[0].shape[1])
    device = next(graph.parameters()).device
    return measure_latency(graph, blank.to(device, torch.uint8), make_timer(None, identity))


# -- Held-out data


def _accuracy_on(heldout: Iterable[Batch]) -> Metric:
    def accuracy(network: nn.Module) -> float:
        logits, labels = answers(network, heldout)
        if labels is None:
            raise ConfigError(
                "heldout: max_accuracy_drop needs labels; yield (images, labels), or give metric="
            )
        return (logits.argmax(dim=1) == labels).double().mean().item()

    return accuracy
