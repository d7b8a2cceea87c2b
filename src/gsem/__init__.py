"""gsem: Gradient Semi-Masking for robust image classifiers, trained and measured honestly."""

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
