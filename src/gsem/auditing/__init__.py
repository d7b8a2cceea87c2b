"""Is a robust accuracy real? Checks, each with a figure, a threshold and what to do, and the verdict."""

from gsem.auditing.check import Audit as Audit
from gsem.auditing.check import Check as Check
