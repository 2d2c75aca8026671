"""What benchmarks do to the machine and ask it: the page cache, and how much memory a process holds."""

from __future__ import annotations

import os
import threading
from pathlib import Path


class Resident:
    """Largest rise of this process's resident memory while inside, in bytes."""

    def __enter__(self) -> Resident:
        self._before, self.rise, self._stop = self._now(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.rise = max(self.rise, self._now() - self._before)

    @staticmethod
    def _now() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def out_of_cache(folder: Path) -> None:
    """Drop the folder's pages from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)
