"""The heap of this process: keep freed memory for the next step, and replay a step to see what malloc takes for it.

A training step makes and frees the same large tensors again and again. By default the GNU C library gives each block
above 32 MiB back to the system and asks for it anew, page by page, which took a fifth of a step of 8 runs in one pass
(docs/decisions.md). `keep` makes it hold on to them.

Where a product is with a matrix as large as the output layer of a language model, oneDNN makes a copy of it, on a page
of its own, for each product. A freed block of that kind never fits the next one, as a few bytes at its front are taken
by then, so a kept heap grew by 0.23 GB with each step of SmolLM2. There, blocks above 32 MiB go back to the system.

A process takes more memory than its tensors have, because malloc leaves holes between them. The holes follow from the
order of sizes and from small blocks in between, which keep a hole from being as large as the next tensor needs it with
its alignment. So an estimate replays the order through this machine's own malloc, in a process of its own, without
touching the memory. The GNU C library says how far its heap grew; with another C library no holes are counted.
Run as a program, this file reads the orders on stdin; it imports little, to start fast.
"""

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress

Event = tuple[int, int]  # (number of a storage, its bytes where it is made or 0 where it is freed)

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # mallopt's numbers for them
ALIGNMENT = 64  # of PyTorch's tensors on CPU
LARGE = 31 << 20  # a freed block up to 32 MiB, as loading leaves some, makes malloc take later ones from its heap
SETTINGS = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")  # environment, read at the start
MOST_MMAP = 32 << 20  # bytes; the largest threshold that malloc takes
MANY_MAPS = 65536  # blocks with pages of their own, as many as malloc allows by default
SMALL = (104, 208, 56, 72, 320)  # bytes of what PyTorch makes beside a storage: its record, the tensor's, autograd's


class _Info(ctypes.Structure):
    """What `mallinfo2` returns."""

    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


def problem() -> str | None:
    """Why this process is not told to keep freed memory; None if it is."""
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        return "this C library has no mallopt"
    chosen = next((name for name in SETTINGS if name in os.environ), None)
    return None if chosen is None else f"{chosen} is set, so malloc does as the environment says"


def keep(large: bool = True) -> None:
    """Keep freed memory in this process from now on, so that the next step finds its pages in place.

    With `large` blocks of any size are kept, else those up to 32 MiB.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_MAX, 0 if large else MANY_MAPS)  # 0: no block gets pages of its own
    if not large:
        libc.mallopt(MMAP_THRESHOLD, MOST_MMAP)
    libc.mallopt(TRIM_THRESHOLD, -1)  # the end of the heap is never given back


def resident(events: Sequence[Event], kept: bool, large: bool = True) -> int | None:
    """The most bytes that malloc takes from the system, over numbers of small blocks; None where that is not known.

    `kept` is true for a process that has called `keep(large)`. It is not known with another C library, and where the
    order asks for more than this machine lets a process have.
    """
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        return None
    program = [sys.executable, "-I", "-S", __file__]
    out = subprocess.run(program, input=json.dumps([events, kept, large]), capture_output=True, text=True, check=True)
    found = out.stdout.split()
    return max(map(int, found)) if len(found) == len(SMALL) + 1 else None


def replayed(events: Sequence[Event], kept: bool, large: bool, small: Sequence[int]) -> int:
    """`resident` for one number of small blocks, in this process, whose heap then is no longer fresh."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _Info
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes, libc.posix_memalign.argtypes = [ctypes.c_void_p], [ctypes.c_void_p] + [ctypes.c_size_t] * 2

    def taken() -> int:
        info = libc.mallinfo2()
        return int(info.arena + info.hblkhd)

    if kept:
        keep(large)
    else:
        libc.free(libc.malloc(LARGE))
    before = most = taken()
    blocks: dict[int, list[int]] = {}
    place = ctypes.c_void_p()
    for key, size in events:
        if size:
            if libc.posix_memalign(ctypes.byref(place), ALIGNMENT, size):
                raise MemoryError(size)
            blocks[key] = [place.value or 0, *(libc.malloc(n) for n in small)]
            most = max(most, taken())
        else:
            for block in blocks.pop(key):
                libc.free(block)
    return most - before


def main() -> None:
    """Print the bytes for each number of small blocks."""
    events, kept, large = json.load(sys.stdin)
    for count in range(len(SMALL) + 1):
        child = os.fork()  # each number of small blocks on a fresh heap
        if not child:
            with suppress(MemoryError):
                os.write(1, f"{replayed(events, kept, large, SMALL[:count])}\n".encode())
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
