"""Attacks: functions of a model, images and labels that return adversarial images. They attack any classifier."""

from gsem.attacks._core import Counting as Counting
from gsem.attacks._core import Step as Step
from gsem.attacks._core import counting as counting
from gsem.attacks.pgd import pgd as pgd
