"""What `eps-compact` writes, all of it or nothing: network, certificate, block map."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eps_core.errors import ConfigError, FileFormatError, naming

if TYPE_CHECKING:
    from eps_compact.artifact import CompactArtifact

FORMAT = "eps-resnet-certificate"
VERSION = 1


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where the files go: `compact` as the user named it, the others beside it."""

    compact: Path

    @property
    def certificate(self) -> Path:
        return self.compact.with_suffix(".json")

    @property
    def picture(self) -> Path:
        return self.compact.with_suffix(".png")

    @property
    def all(self) -> tuple[Path, ...]:
        return self.compact, self.certificate, self.picture

    def check(self, checkpoint: Path) -> None:
        """Raise ConfigError for names that cannot be written, before any work."""
        for path, what in ((self.certificate, "certificate"), (self.picture, "block map")):
            if self.compact == path:
                raise ConfigError(
                    f"-o {self.compact}: {path.suffix} is the {what}'s name; end it in .pt"
                )
        folder = next(parent for parent in self.compact.absolute().parents if parent.exists())
        if not folder.is_dir():
            raise ConfigError(f"-o {self.compact}: {folder} is a file, not a folder")
        for path in self.all:
            if path.is_dir():
                raise ConfigError(f"{path}: is a folder; name a file with -o")
            if path.exists() and checkpoint.exists() and path.samefile(checkpoint):
                raise ConfigError(
                    f"-o {self.compact}: would overwrite the checkpoint; name another file"
                )

    def to_dict(self) -> dict[str, str]:
        return {
            "compact": str(self.compact),
            "certificate": str(self.certificate),
            "picture": str(self.picture),
        }


def export_files(compact: Path, kind: str) -> tuple[Path, ...]:
    """The files of `--export kind`, beside the artifact; the network itself is the first."""
    network = compact.with_suffix(f".{kind}")
    return (
        (network, network.with_name(f"{network.name}.json"))
        if kind == "safetensors"
        else (network,)
    )


def write(artifact: CompactArtifact, picture: bytes, outputs: Outputs) -> None:
    """Write the three files: first all aside, then all renamed into place.

    What fails leaves the folder as it was, earlier files too.
    """
    from eps_core.files import replace_file

    staged = {path: path.with_name(f".{path.name}.new") for path in outputs.all}
    placed = []
    try:
        with naming(outputs.compact):
            artifact.save(staged[outputs.compact])
        content = json.dumps(certificate_file(artifact), indent=2, allow_nan=False) + "\n"
        with naming(outputs.certificate):
            replace_file(staged[outputs.certificate], content.encode())
        with naming(outputs.picture):
            replace_file(staged[outputs.picture], picture)
        for path, aside in staged.items():
            new = not path.exists()
            with naming(path):
                aside.replace(path)
            if new:
                placed.append(path)
    except BaseException:
        for path in placed:
            path.unlink(missing_ok=True)
        raise
    finally:
        for aside in staged.values():
            aside.unlink(missing_ok=True)


def certificate_file(artifact: CompactArtifact) -> dict[str, Any]:
    """The artifact's certificate as a file of its own, with the digests that tie the two."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "artifact": artifact.digest,
        **artifact.certificate,
        "checkpoint": dict(artifact.checkpoint),
    }


def read_certificate(path: Path) -> dict[str, Any]:
    """A `compact.json`; FileFormatError when it is something else."""
    from eps_core.checksummed import read_bytes

    try:
        found = json.loads(read_bytes(path))
    except ValueError as error:
        raise FileFormatError(f"{path}: is not JSON ({error}); run eps-compact again") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise FileFormatError(f"{path}: is no certificate of eps-compact; run it again")
    return found
