"""The meeting point of the ranks: a socket that listens before any of them is started."""

from __future__ import annotations

import errno
import ipaddress
import socket
from typing import Any, TypeAlias

from fabric_core.errors import LaunchError

# IPv4: (host, port). IPv6: (host, port, flow, scope).
_Place: TypeAlias = "tuple[Any, ...]"

_NOT_HERE = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}


def listening_socket(address: str = "127.0.0.1", port: int | None = None) -> socket.socket | None:
    """Open a TCP socket that listens on ``address`` only. The caller owns it.

    Because it listens already, no other program can take the port before rank 0 is up, and ranks that come
    earlier wait in its queue. It can be handed to global rank 0 by its file descriptor.

    Args:
        address: A host name or IP address.
        port: The port, or ``None`` for any that is free.

    Returns:
        The socket, or ``None`` when ``address`` does not belong to this machine.

    Raises:
        LaunchError: The port is taken or may not be used, or the address cannot be resolved.
    """
    for family, place in _resolve(address, port or 0):
        try:
            return _listen(family, place)
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise LaunchError(_advice(address, port, error)) from error
    return None


def reserved_socket(address: str) -> socket.socket:
    """Keep a free port on ``address``, without listening, for another process that may listen. The caller owns it.

    Both have to allow the other (``SO_REUSEADDR``), as servers on POSIX systems do. To all others the port is taken.
    """
    family, place = _resolve(address, 0)[0]
    return _bound(family, place)


def meeting_point(address: str, port: int | None, *, single_node: bool) -> socket.socket | None:
    """Open the socket at which global rank 0 will meet the others. Called on its node only. The caller owns it.

    Args:
        address: Where global rank 0 is, as seen from all nodes.
        port: The port, or ``None`` for any that is free.
        single_node: Whether all ranks are on this machine.

    Returns:
        The socket; ``None`` when rank 0 has to open one itself that other machines can reach: ``address`` is none of
        this machine's, or a name that only other nodes know by an address of the network.

    Raises:
        LaunchError: As `listening_socket`.
    """
    if not single_node and resolves_to_loopback(address):
        return None
    return listening_socket(address, port)


def _listen(family: int, place: _Place) -> socket.socket:
    listener = _bound(family, place)
    try:
        listener.listen(socket.SOMAXCONN)
    except OSError:
        listener.close()
        raise
    return listener


def _bound(family: int, place: _Place) -> socket.socket:
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(place)
    except OSError:
        bound.close()
        raise
    return bound


def resolves_to_loopback(name: str) -> bool:
    """Whether a host *name* leads to loopback here, as the machine's own often does. No for an IP address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name != "localhost" and ipaddress.ip_address(_resolve(name, 0)[0][1][0]).is_loopback
    return False


def _resolve(address: str, port: int) -> list[tuple[int, _Place]]:
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
        return [(family, place) for family, _, _, _, place in found]
    except OSError as error:
        raise LaunchError(
            f"The main address {address!r} cannot be resolved: {error}. "
            "Give an IP address, or a host name that every node knows."
        ) from error


def _advice(address: str, port: int | None, error: OSError) -> str:
    reason = {
        errno.EADDRINUSE: "it is already in use",
        errno.EACCES: "this user may not listen on it",
    }.get(error.errno or 0, error.strerror or str(error))
    return (
        f"Cannot listen on {address} port {port}: {reason}. No process was started. "
        "Choose another port with main_port (--main-port); on a single node leave it out, to get a free one."
    )
