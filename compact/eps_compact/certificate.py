"""Certificate of a compaction: evidence for every removed block, and proof of equal logits.

Rewriting (removal of blocks and gates) must keep logits equal to the last bit; folding may change
them by rounding.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from types import FunctionType
from typing import Any

import msgspec
import torch
from torch import Tensor, fx, nn

from eps_compact.evidence import ActivationStatistics, BlockEvidence
from eps_core.checks import Parity, compare_logits
from eps_core.errors import EpsError
from eps_train.gating.tracing import ByMode, in_mode
from eps_train.training.checkpoint import Checkpoint, current_versions
from eps_train.training.evaluate import logits
from eps_train.training.forward import cpu_threads

BATCHES = (1, 7, 32)  # kernels are chosen by batch size, so each is compared with itself
ROUNDS = 2  # batches of each size and each kind of input
SEED = 0  # of the random images
AT_ONCE = 4  # batches that are computed in parallel, each of which takes memory
REWRITING, FOLDING = "rewriting", "folding"  # stages of the proof
BOUND = 1e-5  # of the folding, relative to the largest logit
ALL_EVIDENCE = "training record and held-out images"
RECORD_ALONE = "training record alone"
_SLACK = 1e-6  # relative; epsilon is a float32 number on the gate


class ProofError(EpsError):
    """The compact network differs from the gated one, or a removed block is not dead."""


def failure(proof: Parity) -> str:
    """One line for a proof that has not passed."""
    where = f"on {proof.inputs} at batch {proof.worst_batch}"
    if proof.stage == REWRITING:
        unequal = proof.max_abs is not None
        amount = f"by up to {proof.max_abs:g}" if unequal else "logits that are not finite"
        return (
            f"the compact network differs from the gated one {where} ({amount}); train again,"
            " or report this as a bug"
        )
    amount = (
        "makes logits that are not finite"
        if proof.relative is None
        else f"moves logits by {proof.relative:.1e} of the largest, more than {proof.limit:g},"
    )
    return f"folding {amount} {where}; keep it unfolded with --no-fold"


def compare(
    gated: nn.Module,
    plain: nn.Module,
    normalize: nn.Module,
    heldout: Tensor,
    folded: nn.Module | None = None,
) -> tuple[Parity, ...]:
    """Compare logits of `gated` and `plain`, and of `plain` and `folded` if given.

    All are in evaluation mode and on one device. Inputs are `heldout` (uint8 `[N, C, H, W]`; N may
    be 0) and random images, at every batch size of `BATCHES`. All comparisons of rewriting come
    before all of folding.

    On the CPU every batch is computed on one thread, several batches in parallel: threads that
    share one small layer mostly wait for each other.
    """
    networks = [gated, plain] if folded is None else [gated, plain, folded]
    # The largest first, so that none of them is left over at the end.
    shown = [(size, *named) for size in reversed(BATCHES) for named in _inputs(heldout, size)]

    def answers(batch: Tensor) -> list[Tensor]:
        return [logits(network, normalize, batch) for network in networks]

    with ExitStack() as modes:
        for network in networks:  # before threads share them: `logits` restores what it finds
            modes.enter_context(in_mode(network, False))
        said = iter(_each(answers, [b for size, _, images in shown for b in images.split(size)]))
    proofs = []
    for size, inputs, images in shown:
        batches = [next(said) for _ in images.split(size)]
        expected, found, *others = (
            torch.cat(each).cpu().numpy() for each in zip(*batches, strict=True)
        )
        pairs = [(REWRITING, 0.0, expected, found)]
        pairs += [(FOLDING, BOUND, found, rounded) for rounded in others]
        proofs += [
            compare_logits(stage, [a], [b], batches=[size], limit=limit, inputs=inputs)
            for stage, limit, a, b in pairs
        ]
    return tuple(sorted(proofs, key=lambda proof: (proof.stage == FOLDING, proof.worst_batch)))


def _each(
    answers: Callable[[Tensor], list[Tensor]], batches: Sequence[Tensor]
) -> list[list[Tensor]]:
    """Call `answers` with each batch, on the CPU several at a time; results are in order."""
    if batches[0].device.type != "cpu":
        return [answers(batch) for batch in batches]
    workers = min(torch.get_num_threads(), AT_ONCE)
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    with cpu_threads(1), pool:
        return list(pool.map(answers, batches))


def prove(
    gated: nn.Module,
    plain: nn.Module,
    normalize: nn.Module,
    heldout: Tensor,
    folded: nn.Module | None = None,
) -> tuple[Parity, ...]:
    """Prove that `plain` computes what `gated` does, to the last bit, and `folded` within `BOUND`.

    Arguments and result are those of :func:`compare`. Raises ProofError for the first comparison
    that fails; it names the inputs, the batch size, and the largest difference.
    """
    proofs = compare(gated, plain, normalize, heldout, folded)
    for proof in proofs:
        if not proof.passed:
            raise ProofError(failure(proof))
    return proofs


def check_evidence(checkpoint: Checkpoint) -> None:
    """Raise ProofError when a dead block's record does not show responses within epsilon."""
    for record in checkpoint.gates:
        death = record.death
        if death is None:
            continue
        limit = death.epsilon * (1 + _SLACK)
        silent = death.peak <= limit and death.heldout_peak <= limit
        if not (silent and death.steps > 0 and death.samples > 0):
            raise ProofError(
                f"block {record.block}: its record does not show it dead (peak {death.peak:g} in"
                f" {death.steps} steps, {death.heldout_peak:g} on {death.samples} held-out images,"
                f" epsilon {death.epsilon:g}); train again"
            )


def certificate(
    checkpoint: Checkpoint,
    *,
    proofs: tuple[Parity, ...],
    statistics: ActivationStatistics,
    closed_at_least: float,
    counts: dict[str, dict[str, int]],
    folded: dict[str, int] | None,
    network: dict[str, Any],
) -> dict[str, Any]:
    """Return the certificate as plain data; see docs/files.md.

    Args:
        checkpoint: what was compacted.
        proofs: all of :func:`prove`.
        statistics: measurements on held-out images.
        closed_at_least: requested share of training steps; 1: only dead blocks are removed.
        counts: `blocks`, `parameters`, `flops`, each `before` and `after`, without folding.
        folded: `pairs` and `parameters` of the folded network; None: it was not folded.
        network: the :func:`fingerprint` of the compact network.
    """
    data = checkpoint.data
    kept = [_entry(block) for block in statistics.live if block.block not in statistics.beyond]
    beyond = [_entry(block) for block in statistics.live if block.block in statistics.beyond]
    folding = [_proof_entry(proof) for proof in proofs if proof.stage == FOLDING]
    return {
        "lossless": not beyond,
        "evidence": ALL_EVIDENCE if statistics.images else RECORD_ALONE,
        "relative_epsilon": checkpoint.relative_epsilon,
        "heldout": statistics.images,
        "removed": prune_records(checkpoint),
        "closed_at_least": closed_at_least,
        "removed_live": beyond,
        "accuracy": statistics.accuracy,
        "proof": [_proof_entry(proof) for proof in proofs if proof.stage == REWRITING],
        "folding": None if folded is None else {"bound": BOUND, **folded, "proof": folding},
        "live": kept,
        "flicker": as_json(statistics.gap),
        "counts": counts,
        "network": network,
        "data": {
            "name": data.name,
            "sha256": data.sha256,
            "split_seed": data.split_seed,
            "sizes": dict(data.sizes),
        },
        "checkpoint": checkpoint.digest,
        "versions": dict(checkpoint.versions),
        "made_with": current_versions(),
    }


def as_json(record: object) -> Any:
    """Return a record as JSON holds it: lists for tuples, None for what is no number."""
    return msgspec.json.decode(msgspec.json.encode(record))


def prune_records(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Return the name of every dead block with the evidence for it."""
    return [
        {"block": record.block, **asdict(record.death)}
        for record in checkpoint.gates
        if record.death is not None
    ]


def _entry(block: BlockEvidence) -> dict[str, Any]:
    return {**asdict(block), "ratio": block.ratio}


def _inputs(heldout: Tensor, size: int) -> Iterator[tuple[str, Tensor]]:
    """Yield named images uint8 `[ROUNDS * size, C, H, W]`; too few held-out ones repeat."""
    count = ROUNDS * size
    if len(heldout):
        # Other sizes start elsewhere, so that together they see more of the images.
        yield "held-out images", heldout[torch.arange(size, size + count) % len(heldout)]
    generator = torch.Generator().manual_seed(SEED + size)
    noise = torch.randint(0, 256, (count, *heldout.shape[1:]), generator=generator)
    yield "random uint8 images", noise.to(torch.uint8).to(heldout.device)


def _proof_entry(proof: Parity) -> dict[str, Any]:
    return {
        "step": proof.stage,
        "inputs": proof.inputs,
        "batch": proof.worst_batch,
        "images": proof.samples,
        "equal": proof.max_abs == 0,
        "max_abs": proof.max_abs,
        "relative": proof.relative,
        "bound": proof.limit,
    }


# -- Fingerprint of a network's code: two builds of one network have the same
#
# A compact network is stored as its name and its tensors; its steps come from code, which may be
# edited or replaced by another version. So the certificate holds a digest of the steps, and a
# sketch of the constants that are not among the stored tensors.

_SCALARS = (bool, int, float, str, type(None), torch.dtype)
_TOLERANCE = 1e-4  # of a sketch: other processors and versions round constants differently


def fingerprint(model: fx.GraphModule) -> dict[str, Any]:
    """Return `code`, a SHA-256 of the network's steps, and `constants`, sketches by name.

    Steps are the operations with their constants, the layers with their settings, and the source
    code (without comments) of layers that are not torch's.
    """
    return {"code": _digest(model), "constants": _sketches(model)}


def difference(model: fx.GraphModule, recorded: Mapping[str, Any]) -> str | None:
    """Return how a network differs from the recorded fingerprint, in words; None if it does not."""
    found = fingerprint(model)
    if found["code"] != recorded["code"]:
        return "the code of its network is not the code that was compacted"
    constants = recorded["constants"]
    if found["constants"].keys() != constants.keys():
        return "the constants of its network are not those that were compacted"
    for name, sketch in found["constants"].items():
        size = max(map(abs, [*sketch, *constants[name]]))
        pairs = zip(sketch, constants[name], strict=True)
        if not all(math.isclose(a, b, abs_tol=_TOLERANCE * size) for a, b in pairs):
            return f"the constant {name} of its network is not the one that was compacted"
    return None


def _digest(model: fx.GraphModule) -> str:
    order = {node: f"%{index}" for index, node in enumerate(model.graph.nodes)}
    lines = []
    for node in model.graph.nodes:
        operands = fx.node.map_arg((node.args, node.kwargs), lambda n: _Word(order[n]))
        lines.append(f"{node.op} {_name(node.target)} {operands!r}")
        if node.op == "call_module":
            lines += _layer(model.get_submodule(str(node.target)))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class _Word(str):
    """A string whose repr has no quotation marks."""

    def __repr__(self) -> str:
        return str(self)


def _name(target: Any) -> str:
    if isinstance(target, str):
        return target
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', target)}"


def _layer(module: nn.Module) -> list[str]:
    """Return the lines of a module and of all modules inside."""
    lines = []
    for path, inner in module.named_modules():
        kind = type(inner)
        lines.append(f"{path} {_name(kind)} {_settings(inner)}")
        if isinstance(inner, ByMode):
            lines.append(f"{_name(inner.function)} {inner.calls!r}")
        lines += [_source(base) for base in kind.__mro__ if not _is_known(base)]
        lines += [_source(v) for v in vars(inner).values() if isinstance(v, FunctionType)]
    return lines


def _settings(module: nn.Module) -> dict[str, Any]:
    """Return a layer's constructor arguments that are attributes and differ from the default.

    So an argument that a later version adds changes nothing.
    """
    parameters = inspect.signature(type(module).__init__).parameters.values()
    kept = {p.name: (vars(module)[p.name], p.default) for p in parameters if p.name in vars(module)}
    return {n: value for n, (value, usual) in kept.items() if _is_plain(value) and value != usual}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return isinstance(value, _SCALARS)


def _is_known(kind: type) -> bool:
    """Whether the name of the class says what it computes."""
    return kind.__module__.partition(".")[0] in ("torch", "builtins", "eps_train")


def _source(code: Any) -> str:
    try:
        return ast.unparse(ast.parse(textwrap.dedent(inspect.getsource(code))))
    except (OSError, SyntaxError, TypeError):  # from exec(), or a lambda within a call
        inner = getattr(code, "__code__", None)
        return f"{_name(code)} {inner and (inner.co_names, inner.co_consts[1:])}"


def _sketches(model: fx.GraphModule) -> dict[str, list[float]]:
    """Return three sums of each tensor that is not in the state dict, which tell most apart."""
    held = model.state_dict().keys()
    found = {name: buffer for name, buffer in model.named_buffers() if name not in held}
    for path, module in model.named_modules():
        plain = {n: v for n, v in vars(module).items() if isinstance(v, Tensor)}
        found |= {f"{path}.{name}" if path else name: value for name, value in plain.items()}
    return {name: _sketch(value.detach()) for name, value in sorted(found.items())}


def _sketch(tensor: Tensor) -> list[float]:
    values = tensor.cpu().double().flatten().nan_to_num()
    places = torch.arange(len(values), dtype=torch.float64).mul(0.6180339887498949).frac()
    return [values.sum().item(), values.square().sum().item(), (values * places).sum().item()]
