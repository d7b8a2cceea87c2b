"""Where tensors live."""

import torch


def device_named(name: str | None) -> torch.device:
    """A torch device; `None` is the GPU where there is one.

    Raises:
        ValueError: a device that torch does not know or have.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r} is unknown: cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} was asked for, but torch sees no GPU here: use --device cpu")
    return device
