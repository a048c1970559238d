"""Lists of host names as SLURM abbreviates them: ``"gpu[01-03,7],rack[1-2]node[1-2]-ib,login"``."""

from __future__ import annotations

import re
from collections.abc import Iterator

from fabric_core.errors import ConfigurationError

_NAME = re.compile(r"(?:[^,\[\]]|\[[^\[\]]*\])+")
_BRACKET = re.compile(r"([^\[\]]*)\[([^\[\]]*)\](.*)")
_RANGE = re.compile(r"(\d+)-(\d+)|\d+")


def expand(nodelist: str) -> Iterator[str]:
    """The host names of a list, one by one, in its order. Of several brackets the last one runs fastest.

    Example:
        >>> list(expand("a[08-10]-ib,b"))
        ['a08-ib', 'a09-ib', 'a10-ib', 'b']

    Raises:
        ConfigurationError: It is no such list.
    """
    rest = nodelist
    while rest:
        name = _NAME.match(rest)
        if name is None:
            raise _malformed(nodelist)
        yield from _expand_name(name[0], nodelist)
        rest = rest[name.end() :]
        if rest and not re.match(r",[^,]", rest):
            raise _malformed(nodelist)
        rest = rest[1:]


def _expand_name(name: str, nodelist: str) -> Iterator[str]:
    bracket = _BRACKET.fullmatch(name)
    if bracket is None:
        yield name
        return
    head, ranges, tail = bracket.groups()
    for number in _numbers(ranges, nodelist):
        for end in _expand_name(tail, nodelist):
            yield head + number + end


def _numbers(ranges: str, nodelist: str) -> Iterator[str]:
    for item in ranges.split(","):
        match = _RANGE.fullmatch(item)
        if match is None:
            raise _malformed(nodelist)
        first, last = match.groups(default=item)
        if int(first) > int(last):
            raise _malformed(nodelist)
        yield from (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))


def _malformed(nodelist: str) -> ConfigurationError:
    return ConfigurationError(
        f"{nodelist!r} is no list of nodes as SLURM writes them ('node[01-03,7],login'). See what has changed "
        "SLURM_STEP_NODELIST, or set MASTER_ADDR to the host of rank 0."
    )
