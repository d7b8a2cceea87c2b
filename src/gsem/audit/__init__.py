"""Is a robust accuracy real? Checks, each with a figure, a threshold and what to do, and the verdict."""

from gsem.audit.record import Audit as Audit
from gsem.audit.record import Check as Check
