"""``python -m fabric_core`` is ``fabric``."""

from fabric_core.cli import main

if __name__ == "__main__":
    main()
