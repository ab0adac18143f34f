"""The README and every --help use the field's standard terms."""

from __future__ import annotations

import re

import pytest
from click.testing import CliRunner

from tests.meta.project import ROOT, command, scripts

# What not to write, and the standard term.
TERMS = {
    r"(?<!learning )(?<!frame )\brates?\b": "learning rate",
    r"\bpictures?\b": "image",
    r"\b(?:plain|unpruned) twin\b|\bplain network\b": "baseline",
    r"\bbur(?:y|ied)\b|\bobituar(?:y|ies)\b|\bdeaths\b": "pruning state, removed blocks",
    r"\b(?:led|leads?)\b": "target controller; pruned to a target",
    r"\boutlook\b": "pre-flight checks",
    r"\bledgers?\b|\bforking\b": "block importance, leave-one-out",
    r"\bwishes\b": "options",
    r"\bflickers?\b|\bflickering\b": "train/inference gap of live gates",
    r"\binterleaving\b": "interleaved timing",
    r"\bsidecars?\b": "plan metadata",
    r"\blanes?\b": "execution context",
    r"\bnarrowing\b": "cast",
    r"\brefusals?\b": "API error",
    r"\bsealed\b|\bseals?\b": "checksummed, checksum",
    r"\bdeviation\b": "std",
    r"\btaken up by\b": "fused into",
    r"\bis for \w+ alone\b": "only applies to",
    r"\bis told\b": "is configured",
    r"\bdescent\b": "final decay",
}


def assert_standard(text: str) -> None:
    found = [
        f"{match[0]!r} in {line.strip()!r}: write {standard}"
        for line in text.splitlines()
        for pattern, standard in TERMS.items()
        for match in re.finditer(pattern, line, re.IGNORECASE)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", scripts())
def test_help_uses_standard_terms(name: str) -> None:
    result = CliRunner().invoke(command(name), ["--help"], terminal_width=200)
    assert result.exit_code == 0
    assert_standard(result.output)


def test_readme_uses_standard_terms() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert_standard(text)
    assert len(text.splitlines()) <= 120
