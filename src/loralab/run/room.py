"""Room for runs: what a process may take of a GPU that several processes use, and errors that say it was not enough.

PyTorch keeps the memory that it once took, so each of several processes grows until the card is full, and then one of
them fails that alone would have fitted. So each gets a part of the card, beyond which it frees what it keeps.
"""

import torch

from loralab.errors import UserError

CONTEXT = 0.6e9  # bytes, about, that a process takes of a card before it makes a tensor
OF_PART = 0.5  # what a pass may keep for backward; the rest is for weights, and for what a pass needs only at times
LEAST = 1e9  # bytes of a part
PASS_BYTES = {  # device -> most bytes that a shared pass keeps for backward
    "cpu": 400e6,  # more gains no time (docs/benchmarks.md)
    "cuda": 4e9,  # a step waits for Python there, so the more runs in a pass the better
}
ON_GPU = PASS_BYTES["cuda"]
TEXTS = (  # of errors of other types: kernels of CUDA, and allocation on the CPU
    "out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED", "CUDNN_STATUS_ALLOC_FAILED", "CUDNN_STATUS_NOT_INITIALIZED",
)  # fmt: skip
ADVICE = (
    "it needs more memory than was free: a larger accumulate, checkpointing, a smaller max_length or, in a study, "
    "fewer --on processes:N leave it more (loralab plan says what a step takes)"
)


def part_of(total: float, count: int) -> float:
    """Return the bytes that each of `count` processes may take of a card of `total` bytes.

    Raises UserError where that is too little to work with.
    """
    part = total / count - CONTEXT
    if part < LEAST:
        most = max(1, int(total / (LEAST + CONTEXT)))
        raise UserError(
            f"--on processes:{count} leaves each process {max(part, 0) / 1e9:.1f} GB of a GPU of {total / 1e9:.0f} GB, "
            f"expected {LEAST / 1e9:.0f} GB or more: give processes:{most} or fewer"
        )
    return part


def share_card(count: int) -> None:
    """Limit this process, one of `count` on a GPU, to its part of it, and passes to theirs; nothing without a GPU.

    Raises UserError where there are too many.
    """
    if not torch.cuda.is_available():
        return
    total = torch.cuda.get_device_properties(0).total_memory
    part = part_of(total, count)
    torch.cuda.set_per_process_memory_fraction(part / total)
    PASS_BYTES["cuda"] = min(ON_GPU, OF_PART * part)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that there was too little memory, on a GPU or on the CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in TEXTS)
