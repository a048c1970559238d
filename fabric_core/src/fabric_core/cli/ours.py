"""The options of ours among the words of a command line, and what was given to each."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import click

from fabric_core.cli.flags import option_name, part_option


class Ours:
    """The options of ours: their spellings, and the values that were given.

    Args:
        names: The arguments that are ours (``num_nodes`` for ``--num-nodes`` and ``--num_nodes``). Options of parts
            are ours as well: every word that begins with ``--``, one of the kinds of parts, and a dot.
        ctx: For usage errors.
    """

    def __init__(self, names: Iterable[str], ctx: click.Context) -> None:
        self._spellings = {spelling: name for name in names for spelling in (f"--{name}", option_name(name))}
        self._ctx = ctx
        self.flags: dict[str, str] = {}
        self.options: dict[str, dict[str, str]] = {}

    def __contains__(self, word: object) -> bool:
        spelling = str(word).partition("=")[0]
        return spelling in self._spellings or part_option(spelling) is not None

    def take_all(self, words: Iterable[str]) -> list[str]:
        """Take what is ours out of some words; the others.

        Raises:
            click.UsageError: As for `take`.
        """
        left, others = deque(words), []
        while left:
            word = left.popleft()
            if word in self:
                self.take(word, left)
            else:
                others.append(word)
        return others

    def take(self, word: str, left: deque[str]) -> None:
        """Keep what is given to a word of ours, in the word itself or in the next.

        Raises:
            click.UsageError: Nothing is given, or the name of the part's option is missing.
        """
        spelling, equals, value = word.partition("=")
        if not equals:
            if not left or left[0] == "--" or left[0] in self:
                raise click.UsageError(f"The option {spelling} needs a value.", self._ctx)
            value = left.popleft()
        if spelling in self._spellings:
            self.flags[self._spellings[spelling]] = value
            return
        kind, option = part_option(spelling) or ("", "")
        if not option:
            raise click.UsageError(f"Which option of the {kind}? Write {spelling}NAME.", self._ctx)
        self.options.setdefault(kind, {})[option] = value
