"""The audit: checks whether a robust accuracy is real, each with a figure, a threshold and advice, and a verdict."""

from gsem.auditing.check import Audit as Audit
from gsem.auditing.check import Check as Check
