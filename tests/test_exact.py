"""What decides or scores multiplies float32 exactly, on every device, and the caller's settings come back."""

from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from torch import nn

import gsem
from gsem._env import exact_float32, out_of_memory_names
from landscapes import Linear, images, zeros

NEW = hasattr(torch.backends.cudnn, "conv")


def settings() -> tuple:
    backends = torch.backends
    if not NEW:
        return backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32
    owners = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
    return tuple(owner.fp32_precision for owner in owners)


EXACT = ("ieee",) * 4 if NEW else (False, False)


@pytest.fixture(params=["old", "new"] if NEW else ["old"])
def low_precision(request):
    """A caller who allowed fewer bits, by torch's former or by its present interface."""
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn
    if request.param == "old":
        former = matmul.allow_tf32, conv.allow_tf32
        matmul.allow_tf32 = conv.allow_tf32 = True
        yield
        matmul.allow_tf32, conv.allow_tf32 = former
    else:
        former = matmul.fp32_precision, conv.conv.fp32_precision
        matmul.fp32_precision = conv.conv.fp32_precision = "tf32"
        yield
        matmul.fp32_precision, conv.conv.fp32_precision = former


def test_the_settings_are_exact_inside_and_come_back(low_precision):
    before = settings()
    assert before[0] != EXACT[0]
    with suppress(KeyError), exact_float32():
        assert settings() == EXACT
        raise KeyError
    assert settings() == before


class Watching(Linear):
    """A linear model that keeps the settings of each pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add(settings())
        return super().forward(x)


def watching() -> Watching:
    model = Watching(torch.randn((3, 64), generator=torch.Generator().manual_seed(0)))
    model.seen = set()
    return model.eval()


@pytest.mark.parametrize("name", ["fgsm", "pgd", "apgd", "fab", "square", "rays", "cw", "autoattack"])
@pytest.mark.filterwarnings("ignore")
def test_every_attack_decides_in_exact_float32(low_precision, name):
    few = {"fgsm": {}, "pgd": {"steps": 1, "step": 0.1}, "square": {"queries": 2}, "rays": {"queries": 2}}
    more = {"autoattack": {"steps": 1, "queries": 2}}
    x, model = images(2), watching()
    getattr(gsem.attacks, name)(model, x, zeros(x), eps=0.1, **(few | more).get(name, {"steps": 1}))
    assert model.seen == {EXACT}


@pytest.mark.filterwarnings("ignore")
def test_an_evaluation_a_verification_and_an_audit_score_in_exact_float32(low_precision):
    x, model = images(4), watching()
    result = gsem.evaluate(model, x, zeros(x), "pgd:steps=1", eps=0.1, save_adv=True)
    gsem.verify(result, model, x, zeros(x))
    audit = gsem.audit(model, x, zeros(x), "pgd:steps=1", eps=0.1, quick=True, only=["unavailable", "unstable"])
    assert model.seen == {EXACT}
    assert result.metadata["tf32"] is audit.metadata["tf32"] is False


class Full(nn.Module):
    """A model for which the device's memory is too small when it is differentiated."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.requires_grad:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.layer(x.flatten(1))


@pytest.mark.filterwarnings("ignore")
def test_a_full_memory_is_no_finding_of_an_audit():
    x = images(4)
    with pytest.raises(torch.OutOfMemoryError, match=r"try batch_size=64"):
        gsem.audit(Full().eval(), x, zeros(x), "pgd:steps=1", eps=0.1, batch_size=128, only=["unavailable"])


@pytest.mark.filterwarnings("ignore")
def test_a_full_memory_names_a_smaller_batch():
    x = images(4)
    with pytest.raises(torch.OutOfMemoryError, match=r"full with 128 images at once: try batch_size=64"):
        gsem.evaluate(Full().eval(), x, zeros(x), "pgd:steps=1", eps=0.1, batch_size=128)
    with pytest.raises(torch.OutOfMemoryError, match="even one image is too much"), out_of_memory_names(1):
        raise torch.OutOfMemoryError("CUDA out of memory.")


def test_a_training_that_does_not_fit_names_a_smaller_batch(tmp_path, few_digits, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("gsem.training.step.Stepper.__call__", full)
    recipe = replace(gsem.RECIPES["gcat"], batch_size=64)
    with pytest.raises(torch.OutOfMemoryError, match="full with 64 images at once: try batch_size=32"):
        gsem.train(recipe, out=tmp_path / "run", data=few_digits, device="cpu")
