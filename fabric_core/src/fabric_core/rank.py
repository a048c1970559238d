"""The program that every started rank runs: ``python -m fabric_core.rank [--module] TARGET [ARGS…]``.

It only puts the import path in order; `fabric_core.supervisor.program` does the work. A process that is to be copied
for every rank is started in the same way, so that all of them look alike in a list of processes.
"""

import os
import sys


def main() -> None:
    """Run TARGET as ``python TARGET`` would, and tell the supervisor how it ended."""
    __tracebackhide__ = True
    if not getattr(sys.flags, "safe_path", sys.flags.isolated):
        # "-m" put the working directory there, whose files could hide standard modules from what comes next.
        del sys.path[0]
    from fabric_core.supervisor.program import run
    from fabric_core.supervisor.variables import WARM_FD

    if WARM_FD in os.environ:
        from fabric_core.supervisor.copies import become_copies

        become_copies()
    run(sys.argv[1:])


if __name__ == "__main__":
    main()
