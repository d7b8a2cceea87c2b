"""Hashes of a network's structure and weights, and of images and labels."""

import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

MODEL = ("structure", "weights")
DIGITS = 16  # hexadecimal: two different networks agree by accident once in 10^19

SAMPLED_ABOVE = 4 * 2**30  # bytes of images
_AT_ONCE = 32 * 2**20  # numbers read at a time


def model_fingerprint(model: nn.Module) -> dict[str, str]:
    """`structure`: the modules, their settings and their normalisation; `weights`: the state dict.

    Settings are what `print(model)` shows, the numbers (float) and texts that modules keep as attributes, and the
    buffers that are not saved with the weights, like the mean and std of `gsem.normalized`. Constants inside a
    `forward` are not seen.
    """
    # An address in memory (of a function that a module prints) is another one in every process.
    structure = hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", str(model)).encode())
    weights = hashlib.sha256()
    for name, module in model.named_modules():
        settings = {k: v for k, v in vars(module).items() if isinstance(v, (float, str)) and not k.startswith("_")}
        structure.update(repr((name, sorted(settings.items()))).encode())
        for buffer in sorted(module._non_persistent_buffers_set):
            _add(structure, getattr(module, buffer))
    for value in model.state_dict().values():
        _add(weights, value)
    return {"structure": structure.hexdigest()[:DIGITS], "weights": weights.hexdigest()[:DIGITS]}


def data_fingerprint(*parts: tuple[Any, Tensor]) -> dict[str, str]:
    """Hashes `images` and `labels` of one or several pairs (x, y): of the values, their types and their order.

    `x` is a uint8 tensor, or an object that gives one for `x[rows]`; both have the same hash. If the images have more
    than `SAMPLED_ABOVE` bytes, only 1,000 of them, evenly spread, are hashed, since reading all may take hours.
    """
    images, labels = hashlib.sha256(), hashlib.sha256()
    for x, y in parts:
        _add_images(images, x)
        _add(labels, y)
    return {"images": images.hexdigest()[:DIGITS], "labels": labels.hexdigest()[:DIGITS]}


def _add_images(digest: Any, x: Any) -> None:
    n, size = len(x), math.prod(x.shape)
    digest.update(f"{x.dtype}{tuple(x.shape)}".encode())
    if size * x.dtype.itemsize > SAMPLED_ABOVE:
        rows = torch.linspace(0, n - 1, min(n, 1000), dtype=torch.float64).long()
        digest.update(b"sample")
        digest.update(_bytes(x[rows]))
        return
    step = max(1, n * _AT_ONCE // max(size, 1))
    for start in range(0, n, step):
        digest.update(_bytes(x[start : start + step]))


def _bytes(x: Tensor) -> Any:
    return x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _add(digest: Any, value: Any) -> None:
    """Add a value of a state dict: a tensor, or in quantized modules also a tuple or a type."""
    if isinstance(value, (tuple, list)):
        for one in value:
            _add(digest, one)
    elif isinstance(value, Tensor):
        plain = value.detach().cpu()
        plain = (plain.int_repr() if plain.is_quantized else plain).contiguous()
        digest.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy().data)
    else:
        digest.update(str(value).encode())


def same_model(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    """Whether both fingerprints are known, and are of one network."""
    return bool(one and other) and all(one.get(key) == other.get(key) is not None for key in MODEL)  # type: ignore[union-attr]
