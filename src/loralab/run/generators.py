"""The states of torch's own random generators, one a device: what dropout on that device draws next.

A checkpoint keeps those of the devices that hold a model. Written for CUDA, MPS and whatever else torch calls a device,
and tested as far as a CPU shows it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def states(model: nn.Module) -> dict[str, Tensor]:
    """Device, as "cuda:0", -> state (bytes,) on the CPU, of every device that holds a tensor of the model."""
    devices = {t.device for t in (*model.parameters(), *model.buffers())}
    return {str(device): _of(device).get_rng_state(*_named(device)).cpu() for device in sorted(devices, key=str)}


def restore(saved: Mapping[str, Tensor]) -> None:
    """Set the generators to what `states` gave. Raises RuntimeError for a device that is not there."""
    for name, state in saved.items():
        device = torch.device(name)
        _of(device).set_rng_state(state, *_named(device))


def _of(device: torch.device) -> Any:
    """The module of torch that has the generators of a kind of device."""
    return torch.random if device.type == "cpu" else torch.get_device_module(device)


def _named(device: torch.device) -> tuple[torch.device, ...]:
    """The device as an argument, for kinds that can have more than one."""
    return () if device.type in ("cpu", "mps") else (device,)
