"""gsem: Gradient Semi-Masking for robust image classifiers, trained and measured honestly."""

from gsem.module import GSeM as GSeM
from gsem.module import noise as noise
from gsem.module import pass_through as pass_through

__version__ = "0.1.0"
