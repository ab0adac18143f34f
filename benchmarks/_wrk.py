"""Load generation with wrk: requests per second and latency of a server."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass

import click
from _servers import Post, Server

SCRIPT = """
wrk.method = "POST"
wrk.headers = {headers}
local file = assert(io.open("body", "rb"))
wrk.body = file:read("*a")
file:close()
function done(summary, latency)
  local failed = 0
  for _, count in pairs(summary.errors) do failed = failed + count end
  print("RESULT " .. string.format(
    '{{"seconds": %.6f, "requests": %d, "failed": %d, "p50_ms": %.3f, "p99_ms": %.3f}}',
    summary.duration / 1e6, summary.requests, failed,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """wrk's measurement.

    Attributes:
        seconds: duration.
        requests: requests answered, with or without success.
        failed: unsuccessful responses, and connections that broke or timed out.
        p50_ms, p99_ms: latency in milliseconds.
    """

    seconds: float
    requests: int
    failed: int
    p50_ms: float
    p99_ms: float

    @property
    def rate(self) -> float:
        """Requests per second."""
        return self.requests / self.seconds


def need_wrk() -> None:
    if shutil.which("wrk") is None:
        raise click.ClickException("wrk is not installed; on Debian: apt-get install wrk")


def load(server: Server, post: Post, *, connections: int, seconds: int) -> Load:
    """Send `post` over `connections` connections, one request at a time on each."""
    folder = server.folder
    headers = ", ".join(f'["{name}"] = "{value}"' for name, value in post.headers.items())
    (folder / "script.lua").write_text(SCRIPT.format(headers=f"{{{headers}}}"), encoding="utf-8")
    (folder / "body").write_bytes(post.body)
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "-s", "script.lua"]
    done = subprocess.run(
        [*command, server.url + post.path], cwd=folder, capture_output=True, text=True, check=False
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or len(found) != 1:
        raise click.ClickException(server.told(f"failed: {done.stdout}{done.stderr}".strip()))
    return Load(**json.loads(found[0].removeprefix("RESULT ")))
