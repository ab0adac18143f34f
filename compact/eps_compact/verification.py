"""Verification of an artifact from files: `compact.pt` and the checkpoint it was made from."""

from __future__ import annotations

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

# Checks that need the right network; with the two before them, those that need its checkpoint.
_ON_NETWORK = ("tensors", "rewriting", "folding", "counts")
_ON_CHECKPOINT = ("network", "evidence", *_ON_NETWORK)

Outcome = tuple[bool | None, str]  # `passed` and `detail` of a Check


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

    def add(name: str, passed: bool | None, detail: str) -> None:
        found.checks.append(Check(name, passed, detail))

    add("artifact", True, f"SHA-256 {artifact.digest[:12]} matches")
    add("code", *_code(artifact))
    add("certificate", *_certificate_beside(path, artifact))
    recorded = artifact.checkpoint["digest"]
    if not source.digest == recorded == artifact.certificate.get("checkpoint", recorded):
        differ = f"digest {source.digest[:12]}, recorded {recorded[:12]}"
        remedy = "made from another checkpoint; name that one with --checkpoint"
        add("checkpoint", False, f"{differ}: {remedy}")
        for name in _ON_CHECKPOINT:
            add(name, None, "not the right checkpoint")
        return found
    add("checkpoint", True, f"SHA-256 {source.digest[:12]} is the recorded one")
    heldout, data = _data(artifact, source, data_root, no_data)
    add("data", *data)
    right, detail = _network(artifact, source)
    add("network", right, detail)
    add("evidence", *_evidence(artifact, source))
    if not right:
        for name in _ON_NETWORK:
            add(name, None, "not the right network")
        return found
    report("proving it again")
    shut = artifact.gated(source)
    plain, shipped = compact(shut), artifact.build()
    add("tensors", *_tensors(artifact, plain))
    networks = [shut, plain, shipped] if artifact.folded else [shut, shipped]
    images = proof_images(heldout, source.data.input_shape)
    proofs = certificate.compare(networks, Normalize.of(source.data), images)
    equal = [proof for proof in proofs if proof.stage == certificate.REWRITING]
    add("rewriting", *_proven(equal, "all logits equal (torch.equal)"))
    if close := [proof for proof in proofs if proof.stage == certificate.FOLDING]:
        worst = max(proof.relative or 0.0 for proof in close)
        moved = f"logits move by {worst:.1e} of the largest, limit {certificate.BOUND:g},"
        add("folding", *_proven(close, moved))
    else:
        add("folding", None, "not folded")
    add("counts", *_counts(artifact, source, plain, shipped))
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


def _code(artifact: CompactArtifact) -> Outcome:
    recorded = artifact.certificate.get("network")
    if recorded is None:
        return None, "the certificate has no digest of the network's code"
    if reason := artifact.other_code(artifact.build()):
        return False, reason
    return True, f"digest {recorded['code'][:12]} is that of the network's code"


def _certificate_beside(path: Path, artifact: CompactArtifact) -> Outcome:
    beside = path.with_suffix(".json")
    if not beside.exists():
        return None, f"no {beside.name} beside it"
    found = read_certificate(beside)
    if found.get("artifact") != artifact.digest:
        return False, f"{beside.name} belongs to {str(found.get('artifact'))[:12]}"
    if found != artifact.certificate_file():
        return False, f"{beside.name} differs from the artifact's certificate"
    return True, f"{beside.name} is the artifact's certificate"


def _data(
    artifact: CompactArtifact, source: Checkpoint, root: Path | None, no_data: bool
) -> tuple[Part | None, Outcome]:
    identity = source.data
    if artifact.data != identity:
        return None, (False, "artifact and checkpoint name different data")
    if no_data:
        return None, (None, "--no-data: random images only")
    try:
        part = load_again(identity, root).validation
    except (DataError, ConfigError) as error:
        if root is not None:
            raise
        return None, (None, f"random images only: {error}")
    detail = f"{identity.name}: {len(part):,} held-out images, SHA-256 {identity.sha256[:12]}"
    return part, (True, detail)


def _network(artifact: CompactArtifact, source: Checkpoint) -> Outcome:
    ours, theirs = artifact.network, source.network
    if (ours.family, ours.arguments) != (theirs.family, theirs.arguments):
        return False, f"{ours.family}, the checkpoint holds {theirs.family}"
    live = [entry["block"] for entry in artifact.certificate.get("removed_live", [])]
    wanted, removed = {*source.dead, *theirs.removed, *live}, set(ours.removed)
    wrong = []
    if surplus := sorted(removed - wanted):
        wrong.append(f"removed without a reason: {', '.join(surplus)}")
    if missing := sorted(wanted - removed):
        wrong.append(f"dead but not removed: {', '.join(missing)}")
    if wrong:
        return False, "; ".join(wrong)
    if bool(live) == bool(artifact.certificate.get("lossless", True)):
        return False, "the certificate is wrong about being lossless"
    if live:
        return True, f"NOT lossless: besides the dead blocks, {len(live)} live ones are removed"
    return True, f"the {len(removed)} removed blocks are those that the checkpoint records as dead"


def _evidence(artifact: CompactArtifact, source: Checkpoint) -> Outcome:
    try:
        certificate.check_evidence(source)
    except ProofError as error:
        return False, str(error)
    stated = artifact.certificate.get("removed", [])
    if stated != certificate.prune_records(source):
        return False, "the certificate has other dead blocks than the checkpoint"
    return True, f"{len(stated)} dead blocks, each within epsilon in training and held out"


def _tensors(artifact: CompactArtifact, plain: fx.GraphModule) -> Outcome:
    again, pairs = fold(plain) if artifact.folded else (plain, ())
    state = again.state_dict()
    if pairs != artifact.folded or state.keys() != artifact.state.keys():
        return False, "the tensors are not those of the checkpoint"
    for name, tensor in state.items():
        if not torch.equal(tensor, artifact.state[name]):
            return False, f"{name} differs from the checkpoint's"
    return True, f"all {len(state)} are those of the checkpoint"


def _proven(proofs: list[Parity], result: str) -> Outcome:
    failed = next((proof for proof in proofs if not proof.passed), None)
    if failed is not None:
        return False, failure(failed)
    kinds = " and ".join(dict.fromkeys(proof.inputs for proof in proofs))
    sizes = ", ".join(str(size) for size in dict.fromkeys(proof.worst_batch for proof in proofs))
    images = sum(proof.samples for proof in proofs)
    return True, f"{result} on {images} {kinds} at batches {sizes}"


def _counts(
    artifact: CompactArtifact, source: Checkpoint, plain: fx.GraphModule, shipped: fx.GraphModule
) -> Outcome:
    stated = artifact.certificate.get("counts")
    if stated is None:
        return None, "the certificate has none"
    counted = counts(source, artifact.network.removed, plain)
    folding = artifact.certificate.get("folding") or {}
    folded = folded_counts(artifact, shipped) or {}
    wrong = [name for name, count in counted.items() if count != stated.get(name)]
    wrong += [f"folding {name}" for name, count in folded.items() if folding.get(name) != count]
    if wrong:
        return False, f"the certificate is wrong about {', '.join(wrong)}"
    parameters, flops = counted["parameters"], counted["flops"]
    return True, (
        f"{parameters['before']:,} to {parameters['after']:,} parameters, {flops['before']:,} to"
        f" {flops['after']:,} FLOPs an image"
    )
