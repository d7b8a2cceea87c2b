"""robustbench:NAME:DATA:THREAT, by a module with the interface of robustbench's loader.

robustbench itself needs torchvision, which this package does without.
"""

import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from gsem.nn.load import load_model, weights_in


@pytest.fixture
def asked(monkeypatch):
    """The arguments that the loader was called with."""
    seen = []

    def load_model(model_name, model_dir="./models", dataset="cifar10", threat_model="Linf", custom_download_func=None):
        seen.append((model_name, dataset, threat_model))
        if model_name == "Unknown":
            raise KeyError(model_name)
        torch.manual_seed(1)
        return nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(12, 3)) if model_name == "Known" else 3

    package, utils = ModuleType("robustbench"), ModuleType("robustbench.utils")
    utils.load_model = load_model
    monkeypatch.setitem(sys.modules, "robustbench", package)
    monkeypatch.setitem(sys.modules, "robustbench.utils", utils)
    return seen


def test_a_model_comes_from_the_loader_in_eval_mode(asked):
    model, metadata = load_model("robustbench:Known:cifar100:L2")
    assert asked == [("Known", "cifar100", "L2")] and metadata == {}
    assert not model.training and model(torch.rand(2, 3, 2, 2)).shape == (2, 3)
    weights = weights_in("robustbench:Known:cifar100:L2")
    assert torch.equal(weights["2.weight"], model.state_dict()["2.weight"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("robustbench:Known", "robustbench:NAME:DATA:THREAT"),
        ("robustbench:Known::Linf", "robustbench:NAME:DATA:THREAT"),
        ("robustbench:Unknown:cifar10:Linf", "failed: KeyError"),
        ("robustbench:Number:cifar10:Linf", "a int, not a torch.nn.Module"),
    ],
)
def test_what_it_cannot_load_is_named(asked, spec, message):
    with pytest.raises(ValueError, match=message):
        load_model(spec)


def test_without_the_package_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "robustbench", None)
    with pytest.raises(ValueError, match="needs the package robustbench"):
        load_model("robustbench:Known:cifar10:Linf")
