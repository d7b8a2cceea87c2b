"""gsem: Gradient Semi-Masking for robust image classifiers, trained and measured honestly.

A public name is imported when it is first used, so that `import gsem` itself loads neither torch nor scipy.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gsem import attacks as attacks
    from gsem import data as data
    from gsem import losses as losses
    from gsem.audit.run import audit as audit
    from gsem.checkpoint import load_model as load_model
    from gsem.compose import report as report
    from gsem.evaluate import evaluate as evaluate
    from gsem.insert import insert as insert
    from gsem.insert import normalized as normalized
    from gsem.insert import straight_through as straight_through
    from gsem.models import MODELS as MODELS
    from gsem.models import create_model as create_model
    from gsem.models import load_published as load_published
    from gsem.module import GSeM as GSeM
    from gsem.module import noise as noise
    from gsem.module import pass_through as pass_through
    from gsem.recipes import RECIPES as RECIPES
    from gsem.recipes import Recipe as Recipe
    from gsem.result import Result as Result
    from gsem.run import Run as Run
    from gsem.run import TrainingDiverged as TrainingDiverged
    from gsem.run import TrainingInterrupted as TrainingInterrupted
    from gsem.suite import SUITES as SUITES
    from gsem.suite import Attack as Attack
    from gsem.train import train as train
    from gsem.twin import search_twin as search_twin
    from gsem.verify import verify as verify

__version__ = "0.1.0"

# Where each public name is defined. The imports above say the same to type checkers; a test compares the two.
_DEFINED_IN = {
    "audit": "gsem.audit.run",
    "load_model": "gsem.checkpoint",
    "report": "gsem.compose",
    "evaluate": "gsem.evaluate",
    "insert": "gsem.insert",
    "normalized": "gsem.insert",
    "straight_through": "gsem.insert",
    "MODELS": "gsem.models",
    "create_model": "gsem.models",
    "load_published": "gsem.models",
    "GSeM": "gsem.module",
    "noise": "gsem.module",
    "pass_through": "gsem.module",
    "RECIPES": "gsem.recipes",
    "Recipe": "gsem.recipes",
    "Result": "gsem.result",
    "Run": "gsem.run",
    "TrainingDiverged": "gsem.run",
    "TrainingInterrupted": "gsem.run",
    "SUITES": "gsem.suite",
    "Attack": "gsem.suite",
    "train": "gsem.train",
    "search_twin": "gsem.twin",
    "verify": "gsem.verify",
}
__all__ = ["attacks", "data", "losses", *_DEFINED_IN]


if not TYPE_CHECKING:  # type checkers would take any name for defined

    def __getattr__(name):
        """A public name, or a submodule, imported at its first use (PEP 562)."""
        from importlib import import_module

        if name in _DEFINED_IN:
            value = getattr(import_module(_DEFINED_IN[name]), name)
            globals()[name] = value
            return value
        if not name.startswith("_"):
            try:
                return import_module(f"gsem.{name}")
            except ModuleNotFoundError as error:
                if error.name != f"gsem.{name}":  # the submodule exists and lacks something else
                    raise
        raise AttributeError(f"module 'gsem' has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__all__})

    class _Package(ModuleType):
        """Keeps a public function where Python binds the submodule of the same name, like `gsem.train`."""

        def __setattr__(self, name, value):
            if not (name in _DEFINED_IN and isinstance(value, ModuleType)):
                super().__setattr__(name, value)

    sys.modules[__name__].__class__ = _Package
