"""Make a virtual environment with torch_xla and this workspace: ``make_environment.py FOLDER``.

torch_xla works with the PyTorch of its own version only, so it cannot live beside the one that the workspace is
developed with. On Linux that PyTorch is the CUDA build; the gigabytes of CUDA libraries that pip would bring along are
left out, and `cuda_stubs` puts stand-ins in their place. Needs gcc, binutils and 2.3 GB of disk.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
import venv
from pathlib import Path

from cuda_stubs import make_stubs

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WITHOUT_DEPENDENCIES = ("torch", "torch_xla")
TOOLS = (
    "click",
    "editables",
    "hatchling",
    "hypothesis",
    "packaging",
    "pluggy",
    "psutil",
    "pytest",
    "pytest-timeout",
    "rich",
    "tomli; python_version < '3.11'",
    "zlib-ng",
)
DISTRIBUTIONS = ("fabric_core", "fabric_backends", "fabric_xla")
SITE_PACKAGES = "import sysconfig; print(sysconfig.get_path('platlib'))"


def pinned() -> list[str]:
    """The requirements of `constraints.txt`."""
    lines = (HERE / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def constraints_of_the_workspace() -> list[str]:
    """What else is pinned, for the tools: everything but what has another version here."""
    here = {re.split("[=;]", line)[0] for line in pinned()}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and re.split("[=;]", line)[0] not in here]


def main(folder: Path) -> None:
    """Make the environment, or bring it up to date."""
    began = time.monotonic()
    if not (folder / "bin" / "python").exists():
        venv.create(folder, with_pip=True, symlinks=True)
    python = folder / "bin" / "python"

    def pip_install(*arguments: str) -> None:
        command = [python, "-m", "pip", "install", "--disable-pip-version-check", "-qq", *arguments]
        subprocess.run(command, check=True, cwd=ROOT)

    alone = [line for line in pinned() if line.split("==")[0] in WITHOUT_DEPENDENCIES]
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join([*pinned(), *constraints_of_the_workspace()]) + "\n", encoding="utf-8")
    pip_install("-c", str(constraints), *(line for line in pinned() if line not in alone), *TOOLS)
    pip_install("--no-deps", *alone)  # last, because pip would miss their dependencies at every other chance
    pip_install("--no-deps", "--no-build-isolation", *(f"--editable=./{name}" for name in DISTRIBUTIONS))
    found = subprocess.run([python, "-c", SITE_PACKAGES], check=True, capture_output=True, text=True)
    stubs = make_stubs(Path(found.stdout.strip(), "torch", "lib"))
    print(f"{folder}: {len(stubs)} stand-ins for CUDA libraries; {time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
