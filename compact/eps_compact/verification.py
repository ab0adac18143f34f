"""Verification of an artifact from files: `compact.pt` and the checkpoint it was made from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import fx

from eps_compact import certificate
from eps_compact.artifact import CompactArtifact, read_certificate
from eps_compact.certificate import ProofError, failure
from eps_compact.compaction import compact, counts, folded_counts, proof_images
from eps_core.checks import Check, Parity, Verification
from eps_core.cli import Log
from eps_core.errors import ConfigError, DataError, FileFormatError
from eps_train.data.dataset import load_again
from eps_train.data.images import Part
from eps_train.gating.folding import fold
from eps_train.models.resnets import Normalize
from eps_train.training.checkpoint import Checkpoint

# Checks that need the right checkpoint; those after the first two need the right network too.
_ON_CHECKPOINT = ("network", "evidence", "tensors", "rewriting", "folding", "counts")


def verify(
    path: Path,
    *,
    checkpoint: Path | None = None,
    data_root: Path | None = None,
    no_data: bool = False,
    report: Log = lambda line: None,
) -> Verification:
    """Verify `path` (a `compact.pt`) against its checkpoint.

    Args:
        checkpoint: None: the one that `path` names.
        data_root: as `--data-root`. Without it, data that cannot be loaded is skipped.
        no_data: use random images only.
        report: receives progress, a line at a time.

    Raises:
        FileFormatError: a file is damaged, foreign or too new.
        ConfigError: the checkpoint does not exist.
        DataError: the data under `data_root` is missing or different.
    """
    artifact = CompactArtifact.load(path, any_code=True)
    source = _checkpoint(path, artifact, checkpoint)
    found = Verification(lossless=bool(artifact.certificate.get("lossless", True)))
    add = found.checks.append
    add(Check("artifact", True, f"SHA-256 {artifact.digest[:12]} matches"))
    add(_code(artifact))
    add(_certificate_beside(path, artifact))
    recorded = artifact.checkpoint["digest"]
    same = source.digest == recorded == artifact.certificate.get("checkpoint", recorded)
    add(
        Check("checkpoint", True, f"SHA-256 {source.digest[:12]} is the recorded one")
        if same
        else Check(
            "checkpoint",
            False,
            f"digest {source.digest[:12]}, recorded {recorded[:12]}: made from another checkpoint;"
            " name that one with --checkpoint",
        )
    )
    if not same:
        found.checks += [Check(n, None, "not the right checkpoint") for n in _ON_CHECKPOINT]
        return found
    heldout, data = _data(artifact, source, data_root, no_data)
    add(data)
    network = _network(artifact, source)
    add(network)
    add(_evidence(artifact, source))
    if network.passed:
        report("proving it again")
        found.checks += _proven(artifact, source, heldout)
    else:
        found.checks += [Check(n, None, "not the right network") for n in _ON_CHECKPOINT[2:]]
    return found


def _checkpoint(path: Path, artifact: CompactArtifact, named: Path | None) -> Checkpoint:
    if not artifact.checkpoint.keys() >= {"path", "digest"}:
        raise FileFormatError(f"{path}: does not say which checkpoint it was made from")
    place = named or path.parent / artifact.checkpoint["path"]
    if named is None and not place.exists():
        raise ConfigError(
            f"{place}: the checkpoint that {path} was made from does not exist;"
            " name it with --checkpoint"
        )
    return Checkpoint.load(place)


def _certificate_beside(path: Path, artifact: CompactArtifact) -> Check:
    beside = path.with_suffix(".json")
    if not beside.exists():
        return Check("certificate", None, f"no {beside.name} beside it")
    found = read_certificate(beside)
    if found.get("artifact") != artifact.digest:
        owner = str(found.get("artifact"))[:12]
        return Check("certificate", False, f"{beside.name} belongs to {owner}")
    if found != artifact.certificate_file():
        return Check("certificate", False, f"{beside.name} differs from the artifact's certificate")
    return Check("certificate", True, f"{beside.name} is the artifact's certificate")


def _code(artifact: CompactArtifact) -> Check:
    recorded = artifact.certificate.get("network")
    if recorded is None:
        return Check("code", None, "the certificate has no digest of the network's code")
    if reason := artifact.other_code(artifact.build()):
        return Check("code", False, reason)
    return Check("code", True, f"digest {recorded['code'][:12]} is that of the network's code")


def _data(
    artifact: CompactArtifact, source: Checkpoint, root: Path | None, no_data: bool
) -> tuple[Part | None, Check]:
    identity = source.data
    if artifact.data != identity:
        return None, Check("data", False, "artifact and checkpoint name different data")
    if no_data:
        return None, Check("data", None, "--no-data: random images only")
    try:
        part = load_again(identity, root).validation
    except (DataError, ConfigError) as error:
        if root is not None:
            raise
        return None, Check("data", None, f"random images only: {error}")
    detail = f"{identity.name}: {len(part):,} held-out images, SHA-256 {identity.sha256[:12]}"
    return part, Check("data", True, detail)


def _network(artifact: CompactArtifact, source: Checkpoint) -> Check:
    ours, theirs = artifact.network, source.network
    if (ours.family, ours.arguments) != (theirs.family, theirs.arguments):
        return Check("network", False, f"{ours.family}, the checkpoint holds {theirs.family}")
    live = [entry["block"] for entry in artifact.certificate.get("removed_live", [])]
    wanted, removed = {*source.dead, *theirs.removed, *live}, set(ours.removed)
    if removed != wanted:
        surplus, missing = sorted(removed - wanted), sorted(wanted - removed)
        detail = f"removed without a reason: {', '.join(surplus)}" if surplus else ""
        lacking = f"dead but not removed: {', '.join(missing)}" if missing else ""
        return Check("network", False, "; ".join(filter(None, (detail, lacking))))
    if bool(live) == bool(artifact.certificate.get("lossless", True)):
        return Check("network", False, "the certificate is wrong about being lossless")
    if live:
        detail = f"NOT lossless: besides the dead blocks, {len(live)} live ones are removed"
    else:
        detail = f"the {len(removed)} removed blocks are those that the checkpoint records as dead"
    return Check("network", True, detail)


def _evidence(artifact: CompactArtifact, source: Checkpoint) -> Check:
    try:
        certificate.check_evidence(source)
    except ProofError as error:
        return Check("evidence", False, str(error))
    stated = artifact.certificate.get("removed", [])
    if stated != certificate.prune_records(source):
        return Check("evidence", False, "the certificate has other dead blocks than the checkpoint")
    return Check(
        "evidence", True, f"{len(stated)} dead blocks, each within epsilon in training and held out"
    )


def _proven(artifact: CompactArtifact, source: Checkpoint, heldout: Part | None) -> Iterator[Check]:
    shut = artifact.gated(source)
    plain = compact(shut)
    shipped = artifact.build()
    yield _tensors(artifact, plain)
    folded = bool(artifact.folded)
    images = proof_images(heldout, source.data.input_shape)
    proofs = certificate.compare(
        shut,
        plain if folded else shipped,
        Normalize.of(source.data),
        images,
        shipped if folded else None,
    )
    yield _equal([proof for proof in proofs if proof.stage == certificate.REWRITING])
    yield _close([proof for proof in proofs if proof.stage == certificate.FOLDING])
    yield _counts(artifact, source, plain, shipped)


def _tensors(artifact: CompactArtifact, plain: fx.GraphModule) -> Check:
    again, pairs = fold(plain) if artifact.folded else (plain, ())
    state = again.state_dict()
    if pairs != artifact.folded or state.keys() != artifact.state.keys():
        return Check("tensors", False, "the tensors are not those of the checkpoint")
    for name, tensor in state.items():
        if not torch.equal(tensor, artifact.state[name]):
            return Check("tensors", False, f"{name} differs from the checkpoint's")
    return Check("tensors", True, f"all {len(state)} are those of the checkpoint")


def _equal(proofs: list[Parity]) -> Check:
    failed = next((proof for proof in proofs if not proof.passed), None)
    if failed is not None:
        return Check("rewriting", False, failure(failed))
    return Check("rewriting", True, f"all logits equal (torch.equal) {_on(proofs)}")


def _close(proofs: list[Parity]) -> Check:
    if not proofs:
        return Check("folding", None, "not folded")
    failed = next((proof for proof in proofs if not proof.passed), None)
    if failed is not None:
        return Check("folding", False, failure(failed))
    worst = max(proof.relative or 0.0 for proof in proofs)
    detail = f"logits move by {worst:.1e} of the largest, limit {certificate.BOUND:g},"
    return Check("folding", True, f"{detail} {_on(proofs)}")


def _on(proofs: list[Parity]) -> str:
    kinds = " and ".join(dict.fromkeys(proof.inputs for proof in proofs))
    sizes = ", ".join(str(size) for size in dict.fromkeys(proof.worst_batch for proof in proofs))
    return f"on {sum(proof.samples for proof in proofs)} {kinds} at batches {sizes}"


def _counts(
    artifact: CompactArtifact, source: Checkpoint, plain: fx.GraphModule, shipped: fx.GraphModule
) -> Check:
    stated = artifact.certificate.get("counts")
    if stated is None:
        return Check("counts", None, "the certificate has none")
    counted = counts(source.network, artifact.network.removed, plain, source.data.input_shape)
    folding = artifact.certificate.get("folding") or {}
    folded = folded_counts(artifact, shipped) or {}
    wrong = [name for name, count in counted.items() if count != stated.get(name)]
    wrong += [f"folding {name}" for name, count in folded.items() if folding.get(name) != count]
    if wrong:
        return Check("counts", False, f"the certificate is wrong about {', '.join(wrong)}")
    parameters, flops = counted["parameters"], counted["flops"]
    return Check(
        "counts",
        True,
        f"{parameters['before']:,} to {parameters['after']:,} parameters, {flops['before']:,} to"
        f" {flops['after']:,} FLOPs an image",
    )
