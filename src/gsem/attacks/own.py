"""Attack functions of the user, for `evaluate`."""

import functools
import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gsem.attacks._types import Norm
from gsem.attacks.suite import ATTACKS, EOT, AttackSpec, parse_attacks
from gsem.rng import derive_seed, seeded


@dataclass(frozen=True)
class OwnAttack:
    """An attack function of the user, with its name in the results. It is used as an `AttackSpec` is.

    It is called `function(model, x, y, ...)`, with those of the keywords eps, norm, seed and eot that it takes, and
    returns x_adv [b, c, h, w] within eps of x and within [0, 1]. See `gsem.evaluate`.

    Raises:
        ValueError: a name that cannot be used, or a function that cannot be called like this.
    """

    name: str
    function: Callable[..., Tensor]
    bounded = True
    follows_gradient = False  # (unknown, so that models without a gradient are accepted)

    def __post_init__(self) -> None:
        pair = 'give it one in a pair: ("my-attack", function)'
        if not re.fullmatch(r"[\w.+=-]+", self.name) or self.name == "worst":
            raise ValueError(f"{self.name!r} cannot be the name of an attack: {pair}, of letters, digits and . _ + = -")
        if self.name in ATTACKS:
            raise ValueError(f"{self.name!r} is the name of an attack of gsem itself: {pair}")
        self._keywords(eps=None, norm=None, seed=None, eot=None)

    def _keywords(self, **known: Any) -> dict[str, Any]:
        """Those of the keywords that the function takes."""
        try:
            signature = inspect.signature(self.function)
        except ValueError:  # of a function in C
            return known
        parameters = signature.parameters
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            known = {key: value for key, value in known.items() if key in parameters}
        try:
            signature.bind(None, None, None, **known)
        except TypeError as error:
            raise ValueError(
                f"attack {self.name!r} cannot be called as function(model, x, y, eps=…, norm=…, seed=…, eot=…): {error}"
            ) from None
        return known

    def resolved(self, *, eps: float, stochastic: bool) -> dict[str, Any]:
        """What results save: the function's qualified name, which does not change with its body."""
        return {"function": _qualified(self.function), "eot": EOT if stochastic else 1}

    def label(self, *, eps: float, stochastic: bool) -> str:
        return self.name

    def passes(self, *, eps: float, stochastic: bool) -> float:
        """Not known, and taken for more than those of any other attack."""
        return math.inf

    def network(self, model: nn.Module) -> nn.Module:
        return model

    def run(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        eps: float,
        norm: Norm,
        stochastic: bool,
        seed: int,
        **_: object,
    ) -> Tensor:
        """x_adv. torch's random stream starts at `seed` for the function, and is restored afterwards.

        Raises:
            ValueError: the function returned no images of the shape of x.
        """
        keywords = self._keywords(eps=eps, norm=norm, seed=seed, eot=EOT if stochastic else 1)
        with seeded(derive_seed(seed, "own"), x.device):
            # Copies: a function that works in place would move the images that its points are compared with.
            found = self.function(model, x.clone(), y.clone(), **keywords)
        found = torch.from_numpy(found) if isinstance(found, np.ndarray) else found
        if not isinstance(found, Tensor) or found.shape != x.shape:
            what = tuple(found.shape) if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise ValueError(f"attack {self.name!r} returned {what}, not images {tuple(x.shape)}")
        return found.detach().to(x)


def _qualified(function: Any) -> str:
    if isinstance(function, functools.partial):
        plain = {key: v for key, v in function.keywords.items() if isinstance(v, str | int | float | None)}
        return f"{_qualified(function.func)}({', '.join(f'{key}={v!r}' for key, v in plain.items())})"
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


AnyAttack = AttackSpec | OwnAttack
AttackLike = AnyAttack | str | Callable[..., Tensor] | tuple[str, Callable[..., Tensor]]


def listed(attacks: AttackLike | Sequence[AttackLike]) -> list[AnyAttack]:
    """Attacks from texts, from `AttackSpec`s, and from functions or pairs (name, function); or from one of them.

    Raises:
        ValueError: something else, or an attack that is unknown or cannot be called.
    """
    if isinstance(attacks, str):
        return [*parse_attacks(attacks)]
    return [_listed(one) for one in (attacks if isinstance(attacks, Sequence) else [attacks])]


def _listed(one: AttackLike) -> AnyAttack:
    if isinstance(one, str):
        return AttackSpec.parse(one)
    if isinstance(one, AttackSpec | OwnAttack):
        return one
    name, function = one if isinstance(one, tuple) and len(one) == 2 else (getattr(one, "__name__", ""), one)
    if not callable(function):
        raise ValueError(
            f"{one!r} is no attack: give a text like 'pgd:steps=100', a function, or a pair (name, function)"
        )
    return OwnAttack(str(name), function)
