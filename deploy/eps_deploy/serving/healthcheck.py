"""HEALTHCHECK of the container images: is the `eps-serve` of the first process ready?

    python -I -m eps_deploy.serving.healthcheck

Host and port are read from the command line of that process. It does not use urllib, which would
ask a proxy that the environment names.
"""

from __future__ import annotations

import contextlib
import http.client
import sys
from pathlib import Path, PurePath

from eps_deploy.cli.serve import cli

PATH = "/v2/health/ready"
_COMMAND = "eps-serve"
_FIRST_PROCESS = Path("/proc/1/cmdline")
_TIMEOUT = 4.0  # seconds
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def address(command_line: bytes) -> tuple[str, int]:
    """Host and port in an `eps-serve` command line from /proc; the defaults without one."""
    words = command_line.decode(errors="surrogateescape").split("\0")[:-1]
    names = [PurePath(word).name for word in words]
    arguments = words[names.index(_COMMAND) + 1 :] if _COMMAND in names else []
    # The server's own parser; invalid options are for the server to report.
    given = cli.make_context(_COMMAND, arguments, resilient_parsing=True).params
    return _LOOPBACK.get(given["host"], given["host"]), given["port"]


def main() -> int:
    """Return the exit status: 0 when the server answers that it is ready."""
    host, port = address(_FIRST_PROCESS.read_bytes())
    with contextlib.closing(http.client.HTTPConnection(host, port, timeout=_TIMEOUT)) as server:
        try:
            server.request("GET", PATH)
            return 0 if server.getresponse().status == 200 else 1
        except (OSError, http.client.HTTPException) as error:
            print(f"{host}, port {port}: {error}")  # `docker inspect` shows it
            return 1


if __name__ == "__main__":
    sys.exit(main())
