"""Disks and folders that fail while a checkpoint is written: one error, the old file intact, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import pytest

SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <sys/uio.h>
#include <unistd.h>

long budget = -1;   /* bytes that can still be written; unlimited below zero */
int failing_sync = 0;

ssize_t write(int file, const void *content, size_t size) {
    static ssize_t (*real)(int, const void *, size_t);
    if (!real) real = dlsym(RTLD_NEXT, "write");
    if (budget < 0) return real(file, content, size);
    if (budget == 0) { errno = EIO; return -1; }
    if ((long)size > budget) size = budget;
    budget -= size;
    return real(file, content, size);
}

ssize_t writev(int file, const struct iovec *parts, int count) {
    static ssize_t (*real)(int, const struct iovec *, int);
    if (!real) real = dlsym(RTLD_NEXT, "writev");
    if (budget < 0) return real(file, parts, count);
    for (int part = 0; part < count; part++)
        if (parts[part].iov_len) return write(file, parts[part].iov_base, parts[part].iov_len);
    return 0;
}

int fsync(int file) {
    static int (*real)(int);
    if (!real) real = dlsym(RTLD_NEXT, "fsync");
    if (failing_sync) { errno = EIO; return -1; }
    return real(file);
}
"""

FAILING_DISK = """
    import ctypes, json, random, sys
    from pathlib import Path
    import torch
    from fabric_core import CheckpointError
    from fabric_core.parts.torch_file import TorchFile

    shim, path = ctypes.CDLL(sys.argv[1]), Path(sys.argv[2])
    budget, failing_sync = (ctypes.c_long.in_dll(shim, "budget"), ctypes.c_int.in_dll(shim, "failing_sync"))
    TorchFile().save(path, {"weight": torch.full((5000,), 1.0)})
    size, chance = path.stat().st_size, random.Random(0)
    errors, intact, entries = [], 0, set()

    def attempt():
        try:
            TorchFile().save(path, {"weight": torch.full((5000,), 2.0)})
        except CheckpointError as error:
            errors.append(str(error))
        finally:
            budget.value, failing_sync.value = -1, 0

    for _ in range(40):
        budget.value = chance.randrange(size)
        attempt()
        intact += bool((TorchFile().load(path)["weight"] == 1).all())
        entries |= {entry.name for entry in path.parent.iterdir()}
    failing_sync.value = 1
    attempt()
    intact += bool((TorchFile().load(path)["weight"] == 1).all())
    attempt()
    print(json.dumps({
        "errors": errors, "intact": intact, "entries": sorted(entries),
        "then": bool((TorchFile().load(path)["weight"] == 2).all()),
    }))
"""

FORBIDDEN_FOLDER = """
    import json, os, sys
    from pathlib import Path
    import torch
    from fabric_core import CheckpointError
    from fabric_core.parts.torch_file import TorchFile

    path = Path(sys.argv[1])
    TorchFile().save(path, {"weight": torch.ones(5)})
    path.parent.chmod(0o555)
    if os.geteuid() == 0:
        os.setresuid(65534, 65534, 65534)
    errors = []
    for target in (path, path.with_name("new.ckpt"), path.parent / "deeper" / "new.ckpt"):
        try:
            TorchFile().save(target, {"weight": torch.zeros(5)})
        except CheckpointError as error:
            errors.append(str(error))
    print(json.dumps({
        "errors": errors, "entries": os.listdir(path.parent), "weight": TorchFile().load(path)["weight"].tolist(),
    }))
"""


def in_a_process(script: str, *arguments: Path, **variables: str) -> Any:
    """Run a script, and give back what it printed as JSON."""
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    environ = {**os.environ, **variables}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environ)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_disk_that_fails_at_any_byte_leaves_the_old_file(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler to make a failing disk with")
    source, shim = tmp_path / "shim.c", tmp_path / "shim.so"
    source.write_text(SHIM)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(shim), str(source), "-ldl"], check=True)
    path = tmp_path / "run" / "x.ckpt"
    found = in_a_process(FAILING_DISK, shim, path, LD_PRELOAD=str(shim))
    assert len(found["errors"]) == found["intact"] == 41
    assert found["entries"] == ["x.ckpt"]
    assert found["then"]
    assert all("x.ckpt" in error and "untouched" in error for error in found["errors"])


def test_a_folder_that_is_forbidden_is_one_error_and_leaves_the_old_file() -> None:
    with tempfile.TemporaryDirectory() as shared:  # the test's own folder can only be entered by this user
        os.chmod(shared, 0o755)
        found = in_a_process(FORBIDDEN_FOLDER, Path(shared) / "run" / "x.ckpt")
        os.chmod(Path(shared) / "run", 0o755)
    assert len(found["errors"]) == 3
    assert all("Permission denied" in error and "untouched" in error for error in found["errors"])
    assert found["entries"] == ["x.ckpt"]
    assert found["weight"] == [1] * 5


def test_a_folder_for_temporary_files_is_not_used(tmp_path: Path) -> None:
    """On another file system than the checkpoint, a file there could not be put in its place whole."""
    script = """
        import json, sys
        from pathlib import Path
        import torch
        from fabric_core.parts.torch_file import TorchFile
        TorchFile().save(Path(sys.argv[1]), {"weight": torch.ones(5)})
        print(json.dumps(TorchFile().load(Path(sys.argv[1]))["weight"].tolist()))
    """
    nowhere = tmp_path / "nowhere"
    found = in_a_process(
        script, tmp_path / "x.ckpt", TMPDIR=str(nowhere), TMP=str(nowhere), TEMP=str(nowhere)
    )
    assert found == [1] * 5
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.ckpt"]
