"""What supervisor and warm process say to each other: a JSON object per line, and the descriptors that go with it."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping, Sequence
from typing import Any

_MOST_DESCRIPTORS = 1


def send(channel: socket.socket, message: Mapping[str, Any], descriptors: Sequence[int] = ()) -> None:
    """Send one message.

    Raises:
        OSError: Nobody is at the other end.
    """
    line = json.dumps(message).encode() + b"\n"
    sent = socket.send_fds(channel, [line], list(descriptors)) if descriptors else 0
    channel.sendall(line[sent:])


def receive(channel: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """Wait for the next message, which answers the last one; ``None`` when the other end is gone.

    Raises:
        OSError: It has not come in time.
    """
    line, descriptors = b"", list[int]()
    while not line.endswith(b"\n"):
        try:
            piece, received, _, _ = socket.recv_fds(channel, 1 << 16, _MOST_DESCRIPTORS)
        except ConnectionError:
            return None, descriptors
        descriptors += received
        if not piece:
            return None, descriptors
        line += piece
    return json.loads(line), descriptors
