"""`eps-verify`: verify a compact network or a bundle again, on any machine, from its files."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import click

from eps_core import cli as console
from eps_core.errors import ConfigError

_OUTCOMES = {True: "passed", False: "FAILED", None: "not run"}


@click.command()
@click.argument("file", metavar="FILE|BUNDLE", type=click.Path(path_type=Path))
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="Checkpoint that FILE was made from.  [default: the path stored in FILE]",
)
@click.option(
    "--data-root",
    type=click.Path(path_type=Path),
    help="Folder with the data set's files; digits needs none.",
)
@click.option("--no-data", is_flag=True, help="Compare outputs on random images only.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON on stdout.")
def cli(
    file: Path, checkpoint: Path | None, data_root: Path | None, no_data: bool, as_json: bool
) -> int:
    """Verify FILE (compact.pt of eps-compact) or BUNDLE (folder of eps-deploy) again.

    A file is verified against the checkpoint that it was made from: checksums and digests, the list
    of removed blocks and the evidence that they are dead, every tensor, both proofs (rewriting is
    exact, folding is within its bound), and the counts. The proofs use held-out images if they can
    be loaded, otherwise random images only.

    A bundle is verified without torch: the SHA-256 of every file, and that for the stored samples
    the engine gives the logits that the network gave in torch.

    The exit code is 3 if a check fails.
    """
    if no_data and data_root is not None:
        raise ConfigError("--no-data: looks at no images; leave out --data-root")
    log = console.log()
    if file.is_dir():
        given = {"--checkpoint": checkpoint, "--data-root": data_root, "--no-data": no_data}
        for option, value in given.items():
            if value:
                raise ConfigError(f"{option}: only applies to a compact.pt; leave it out")
        from eps_deploy.bundle import verify_bundle

        found = verify_bundle(file, report=log.print)
    else:
        from eps_compact.verification import verify

        found = verify(
            file, checkpoint=checkpoint, data_root=data_root, no_data=no_data, report=log.print
        )
    rows = [(check.name, _OUTCOMES[check.passed], check.detail) for check in found.checks]
    table = console.table(str(file), ("check", "result", "what was found"), rows)
    for column in table.columns[1:]:
        column.justify = "left"
    log.print(table)
    if not found.lossless:
        log.print("NOT lossless according to the certificate: live blocks were removed too")
    failed = [check.name for check in found.checks if check.passed is False]
    log.print(f"FAILED: {', '.join(failed)}" if failed else "passed")
    if as_json:
        checks = [{"name": c.name, "passed": c.passed, "detail": c.detail} for c in found.checks]
        facts = {"passed": found.passed, "lossless": found.lossless, "file": str(file)}
        console.emit_json({**facts, "checks": checks})
    return 0 if found.passed else console.CHECK_FAILED


def main() -> NoReturn:
    console.run(cli)
