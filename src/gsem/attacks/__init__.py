"""Attacks: functions (model, x, y, …) → x_adv, for any classifier."""

from gsem.attacks._core import Counting as Counting
from gsem.attacks._core import counting as counting
from gsem.attacks._types import Step as Step
from gsem.attacks.apgd import apgd as apgd
from gsem.attacks.autoattack import autoattack as autoattack
from gsem.attacks.cw import cw as cw
from gsem.attacks.fab import fab as fab
from gsem.attacks.pgd import fgsm as fgsm
from gsem.attacks.pgd import pgd as pgd
from gsem.attacks.rays import rays as rays
from gsem.attacks.square import square as square
from gsem.attacks.transfer import transfer as transfer
from gsem.nn.contract import NotFinite as NotFinite
