"""What a quantized base really takes and loses, layer by layer, counted from its tensors."""

from dataclasses import dataclass

from torch import nn

from loralab.stores.quantized import Quantized


@dataclass(frozen=True)
class Stored:
    values: int  # of the weight
    bytes: int  # of all that is kept of it, statistics and padding too
    error: float  # |W - kept| / |W|, Frobenius norms

    @property
    def bits(self) -> float:
        """Bits per value of the weight."""
        return 8 * self.bytes / self.values


def quantization_report(model: nn.Module) -> dict[str, Stored]:
    """Path of each layer with a quantized base -> what it takes and loses; empty where nothing is quantized."""
    return {
        path.removesuffix(".base"): Stored(base.shape.numel(), sum(b.nbytes for b in base.buffers()), base.error)
        for path, base in model.named_modules()
        if isinstance(base, Quantized)
    }
