"""Write the generated regions of documents: ``python docs/tools/generate.py [--check] FOLDER``.

A document is written by hand, but for what stands between ``<!-- generated: WORD ARGUMENT -->`` and ``<!-- end -->``.
`RENDERERS` says what can stand there. With ``--check``, nothing is written, and the exit code is 1
when something would be.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from renderers import RENDERERS

REGION = re.compile(r"(<!-- generated: (\S+) ?(\S*) -->\n).*?(<!-- end -->)", re.DOTALL)


def renew(text: str) -> str:
    """A document with every region as it should be."""
    return REGION.sub(lambda found: f"{found[1]}\n{RENDERERS[found[2]](found[3])}\n\n{found[4]}", text)


def main(arguments: list[str]) -> int:
    """Go through the documents of a folder; the exit code."""
    check = "--check" in arguments
    (folder,) = (argument for argument in arguments if not argument.startswith("-"))
    stale = 0
    for page in sorted(Path(folder).glob("*.md")):
        old = page.read_text(encoding="utf-8")
        new = renew(old)
        if new != old:
            stale += 1
            sys.stdout.write(
                f"{page}: {'stale; write it anew with: make docs-write' if check else 'written'}\n"
            )
            if not check:
                page.write_text(new, encoding="utf-8")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
