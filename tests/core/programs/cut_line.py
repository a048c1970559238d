"""A store of fsspec in this process, whose line can be cut: ``line://``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class Line(MemoryFileSystem):
    """A store whose line can be cut: after so many calls, or after half of a file."""

    protocol = "line"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    calls_left: int | None = None

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        stripped: str = super()._strip_protocol(path.removeprefix("line:/"))
        return stripped

    def _call(self) -> None:
        if Line.calls_left is not None:
            Line.calls_left -= 1
            if Line.calls_left < 0:
                raise ConnectionError("the line is cut")

    @classmethod
    def reset(cls) -> None:
        """Empty the store, and mend the line."""
        cls.calls_left = None
        cls.store.clear()
        cls.pseudo_dirs[:] = [""]

    def ls(self, path: str, **options: Any) -> Any:
        self._call()
        return super().ls(path, **options)

    def cat_file(self, path: str, **options: Any) -> Any:
        self._call()
        return super().cat_file(path, **options)

    def rm_file(self, path: str) -> None:
        self._call()
        super().rm_file(path)

    def put_file(self, lpath: str, rpath: str, **_: Any) -> None:
        content = Path(lpath).read_bytes()
        self.pipe_file(rpath, content[: len(content) // 2])  # what is there while it is being written
        self._call()
        self.pipe_file(rpath, content)

    def get_file(self, rpath: str, lpath: str, **_: Any) -> None:
        content = self.cat_file(rpath)
        Path(lpath).write_bytes(content[: len(content) // 2])
        self._call()
        Path(lpath).write_bytes(content)

    def cp_file(self, path1: str, path2: str, **options: Any) -> None:
        self._call()
        super().cp_file(path1, path2, **options)

    def info(self, path: str, **options: Any) -> Any:
        self._call()
        return super().info(path, **options)


fsspec.register_implementation("line", Line, clobber=True)
