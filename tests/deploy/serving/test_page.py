"""The page: one file, and a content security policy for its script and style."""

from __future__ import annotations

import base64
import hashlib
import re

from eps_deploy.serving import app


def test_the_page_loads_no_other_resource() -> None:
    text = app.html().decode()
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", text)
    assert "@import" not in text
    assert not re.search(r"url\((?!['\"]?data:)", text)
    assert not re.search(r"\son[a-z]+\s*=", text)  # the policy would not run them
    assert not re.search(r"\sstyle\s*=", text)


def test_the_policy_allows_its_script_and_style() -> None:
    policy = dict(app.page_headers())[b"content-security-policy"].decode()
    text = app.html().decode()
    for kind in ("style", "script"):
        (inner,) = re.findall(f"<{kind}>(.*?)</{kind}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_accessibility() -> None:
    text = app.html().decode()
    assert '<html lang="en">' in text
    assert 'name="viewport"' in text
    assert 'aria-live="polite"' in text
    for identifier in re.findall(r'<label[^>]* for="([^"]+)"', text):
        assert f'id="{identifier}"' in text
