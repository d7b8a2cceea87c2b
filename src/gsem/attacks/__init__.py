"""Attacks: functions (model, x, y, …) → x_adv, for any classifier."""

from gsem.attacks._core import Counting as Counting
from gsem.attacks._core import NotFinite as NotFinite
from gsem.attacks._core import Step as Step
from gsem.attacks._core import counting as counting
from gsem.attacks.pgd import pgd as pgd
