"""Sockets that listen, and how many files a process may have open."""

from __future__ import annotations

import contextlib
import socket

from eps_train.errors import ConfigError

_BACKLOG = 1024
_SPARE_FILES = 64  # beside connections: models, libraries, logs


def listen(host: str, port: int, option: str = "--port") -> socket.socket:
    """A listening socket. Raises ConfigError: no such address, or somebody else has the port.

    `option` is what the port was given with.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {host}: {_told(error)}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        told = f"--host {host} {option} {port}: {_told(error)}; choose another"
        raise ConfigError(told) from None
    return listener


def _told(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def accepted(listener: socket.socket) -> list[socket.socket]:
    """Close the listener, and return the connections that clients believe to be open already.

    The kernel resets those that come between the last `accept` and `close`: nothing stands there.
    """
    connections = []
    with contextlib.suppress(BlockingIOError):
        while True:
            connections.append(listener.accept()[0])
    listener.close()
    return connections


def allow_files(connections: int) -> None:
    """Have as many files open as there may be connections. Raises ConfigError."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            raise ConfigError(
                f"{connections} connections need {wanted} open files, and this process may have"
                f" {hard}; raise the limit (ulimit -n {wanted})"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
