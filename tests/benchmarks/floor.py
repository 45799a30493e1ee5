"""Reads files once, with threads, and does nothing with the bytes: the floor of `ckpt verify`.

python tests/benchmarks/floor.py THREADS FILE ...
"""

from __future__ import annotations

import os
import sys
import threading

BLOCK = 256 * 1024
UNIT = 4 * 1024 * 1024


def read(paths: list[str], threads: int) -> None:
    files = [os.open(path, os.O_RDONLY) for path in paths]
    units = iter([(fd, at) for fd in files for at in range(0, os.fstat(fd).st_size, UNIT)])
    lock = threading.Lock()

    def work() -> None:
        buffer = memoryview(bytearray(BLOCK))
        while True:
            with lock:
                unit = next(units, None)
            if unit is None:
                return
            fd, start = unit
            for at in range(start, start + UNIT, BLOCK):
                if not os.preadv(fd, [buffer], at):
                    break

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


if __name__ == "__main__":
    read(sys.argv[2:], int(sys.argv[1]))
