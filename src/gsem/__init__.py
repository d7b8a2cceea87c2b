"""gsem: Gradient Semi-Masking for robust image classifiers: training, attacks, evaluation, audit and report.

A public name is imported when it is first used, so that `import gsem` itself loads neither torch nor scipy.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gsem import attacks as attacks
    from gsem import data as data
    from gsem import losses as losses
    from gsem.attacks.suite import SUITES as SUITES
    from gsem.attacks.suite import AttackSpec as AttackSpec
    from gsem.auditing.audit import audit as audit
    from gsem.evaluation.certify import CertificationResult as CertificationResult
    from gsem.evaluation.certify import certify as certify
    from gsem.evaluation.compare import compare as compare
    from gsem.evaluation.evaluate import evaluate as evaluate
    from gsem.evaluation.result import EvaluationResult as EvaluationResult
    from gsem.evaluation.verify import verify as verify
    from gsem.nn.folded import fold as fold
    from gsem.nn.gsem import GSeM as GSeM
    from gsem.nn.gsem import noise as noise
    from gsem.nn.gsem import pass_through as pass_through
    from gsem.nn.insert import insert as insert
    from gsem.nn.insert import normalized as normalized
    from gsem.nn.load import load_model as load_model
    from gsem.nn.models import MODELS as MODELS
    from gsem.nn.models import create_model as create_model
    from gsem.nn.models import load_published as load_published
    from gsem.nn.surrogate import straight_through as straight_through
    from gsem.nn.surrogate import surrogate as surrogate
    from gsem.reporting.report import report as report
    from gsem.training.recipe import Recipe as Recipe
    from gsem.training.recipes import RECIPES as RECIPES
    from gsem.training.run import Run as Run
    from gsem.training.run import TrainingDiverged as TrainingDiverged
    from gsem.training.run import TrainingInterrupted as TrainingInterrupted
    from gsem.training.trainer import train as train

__version__ = "0.1.0"

# Where each public name is defined. The imports above are for type checkers; a test compares the two.
_DEFINED_IN = {
    "audit": "gsem.auditing.audit",
    "load_model": "gsem.nn.load",
    "report": "gsem.reporting.report",
    "CertificationResult": "gsem.evaluation.certify",
    "certify": "gsem.evaluation.certify",
    "evaluate": "gsem.evaluation.evaluate",
    "compare": "gsem.evaluation.compare",
    "insert": "gsem.nn.insert",
    "normalized": "gsem.nn.insert",
    "straight_through": "gsem.nn.surrogate",
    "surrogate": "gsem.nn.surrogate",
    "MODELS": "gsem.nn.models",
    "create_model": "gsem.nn.models",
    "load_published": "gsem.nn.models",
    "GSeM": "gsem.nn.gsem",
    "noise": "gsem.nn.gsem",
    "pass_through": "gsem.nn.gsem",
    "RECIPES": "gsem.training.recipes",
    "Recipe": "gsem.training.recipe",
    "EvaluationResult": "gsem.evaluation.result",
    "Run": "gsem.training.run",
    "TrainingDiverged": "gsem.training.run",
    "TrainingInterrupted": "gsem.training.run",
    "SUITES": "gsem.attacks.suite",
    "AttackSpec": "gsem.attacks.suite",
    "train": "gsem.training.trainer",
    "fold": "gsem.nn.folded",
    "verify": "gsem.evaluation.verify",
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
