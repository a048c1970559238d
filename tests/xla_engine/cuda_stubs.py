"""Stand-ins for the CUDA libraries that a CUDA build of PyTorch is linked against.

PyTorch of that build does not load without them, and they are gigabytes that a machine without such a device has no
use for. Each stand-in has the symbols that PyTorch looks up, and every function answers ``cudaErrorNoDevice``, so
``torch.cuda.is_available()`` is False as on any other machine without a device. Needs gcc and binutils.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

LIBRARY = re.compile(r"lib(cu|nccl|nvshmem|nvJitLink|nvrtc|nvToolsExt)")
PREFIXES = "cu[A-Z] cuda cudnn cublas cufft cufile cuFile curand cusolver cusparse nccl nvshmem pnccl"
FUNCTION = re.compile(f"_*({'|'.join(PREFIXES.split())})")
SAYS_A_WORD = re.compile("String|ErrorName|getName")
UNVERSIONED = "libcudart"  # where symbols go of which nothing says in which library they belong

Symbols = dict[str, str]
"""Name to version, which is empty when the symbol has none."""


def output_of(*command: str | Path) -> list[str]:
    """The lines that a program prints."""
    done = subprocess.run([*map(str, command)], check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


def needed_by(library: Path) -> set[str]:
    """The CUDA libraries that a shared library is linked against."""
    found = re.findall(r"NEEDED.*\[(.*)\]", "\n".join(output_of("readelf", "-d", library)))
    return {name for name in found if LIBRARY.match(name)}


def versions_of(library: Path) -> dict[str, str]:
    """For each version of symbols that a shared library wants, the library that has it."""
    owners, owner = {}, ""
    for line in output_of("readelf", "-V", "-W", library):
        if found := re.search(r"File: (\S+)", line):
            owner = found[1]
        if found := re.search(r"Name: (\S+)\s+Flags", line):
            owners[found[1]] = owner
    return owners


def wanted_by(library: Path, defined: set[str]) -> list[tuple[str, str, str]]:
    """The symbols of CUDA that a shared library looks up elsewhere: (library, name, version)."""
    owners, wanted = versions_of(library), []
    for line in output_of("nm", "-D", "--undefined-only", "--with-symbol-versions", library):
        name, _, version = line.split()[-1].partition("@")
        version = version.lstrip("@")
        if version and LIBRARY.match(owners.get(version, "")):
            wanted.append((owners[version], name, version))
        elif not version and name not in defined and FUNCTION.match(name):
            wanted.append((UNVERSIONED, name, ""))
    return wanted


def build(target: Path, symbols: Symbols) -> None:
    """Compile one stand-in."""
    by_version = defaultdict(list)
    for name, version in sorted(symbols.items()):
        by_version[version].append(name)
    functions = [
        f'const char* {name}(void) {{ return "no device"; }}'
        if SAYS_A_WORD.search(name)
        else f"int {name}(void) {{ return 100; }}"
        for name in sorted(symbols)
    ]
    script = [
        f"{version} {{ global: {' '.join(f'{name};' for name in names)} }};"
        for version, names in by_version.items()
        if version
    ]
    with tempfile.TemporaryDirectory() as folder:
        code, versions = Path(folder, "stub.c"), Path(folder, "stub.map")
        code.write_text("\n".join(functions) + "\n")
        versions.write_text("\n".join(script) + "\n")
        flags = [f"-Wl,-soname,{target.name}", *([f"-Wl,--version-script={versions}"] if script else [])]
        output_of("gcc", "-shared", "-fPIC", "-O0", "-w", "-fno-builtin", "-o", target, code, *flags)


def make_stubs(folder: Path) -> list[str]:
    """Write the stand-ins that the libraries in ``torch/lib`` need, beside them.

    Returns:
        Their names; none for a build that needs none.
    """
    libraries = sorted(
        path for path in folder.glob("lib*.so") if re.match("lib(torch|c10|caffe2)", path.name)
    )
    defined = {
        line.split()[-1].split("@")[0]
        for library in libraries
        for line in output_of("nm", "-D", "--defined-only", library)
    }
    needed = set().union(*map(needed_by, libraries))
    symbols: dict[str, Symbols] = {name: {} for name in needed}
    for library in libraries:
        for owner, name, version in wanted_by(library, defined):
            home = next((each for each in needed if each.startswith(owner)), None)
            if home is not None:
                symbols[home].setdefault(name, version)
    for name, own in symbols.items():
        build(folder / name, own)
    return sorted(needed)


if __name__ == "__main__":
    print(*make_stubs(Path(sys.argv[1])), sep="\n")
