"""What every attack of the registry keeps to: the threat model, the caller's random state, its errors."""

import copy
import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gsem
from gsem.attacks import NotFinite, Step
from gsem.attacks.suite import ATTACKS, AttackSpec, suite
from landscapes import Linear, images, rng, size, zeros

SMALL = {"steps": 3, "queries": 12, "eot": 2}
VARIANTS = [
    "pgd:keep=last:restarts=2",
    "pgd:loss=margin",
    "cw:form=unbounded:searches=2:lr=0.1",
    "apgd:targets=2:restarts=2",
    "apgd:targets=3:order=malt",
    "apgd:loss=pm",
    "fab:targets=2:restarts=2",
    "autoattack:version=plus",
]
SPECS = [*(name for name in ATTACKS if name != "clean"), *VARIANTS]
OPTIONS = {option for entry in ATTACKS.values() for option in entry.options}
# Attacks that look for the nearest point, or for the label's boundary, also outside the ball.
LOOKS_OUTSIDE = ("fab", "rays", "autoattack", "cw:form=unbounded")


class Noisy(nn.Module):
    """A model with noise on the logits of each draw."""

    def __init__(self, model: nn.Module, noise: float = 1.0):
        super().__init__()
        self.model, self.noise = model, noise

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        return logits + self.noise * torch.rand_like(logits)


def attack(text: str, model: nn.Module, x: Tensor, y: Tensor, **how) -> Tensor:
    """The attack with small budgets; `how` replaces arguments, and options of its text."""
    spec = AttackSpec.parse(text)
    options = {key: value for key, value in SMALL.items() if key in spec.entry.options} | spec.options
    changes = {key: how.pop(key) for key in list(how) if key in OPTIONS}
    options |= {key: value for key, value in changes.items() if key in spec.entry.options}
    how = {"eps": 0.1, "norm": "Linf", "seed": 0, "stochastic": True, "source_models": {"itself": model}} | how
    return AttackSpec(spec.name, options).run(model, x, y, **how, on_step_always=True)


def linear(classes: int = 5, pixels: int = 64) -> Linear:
    return Linear(torch.randn((classes, pixels), generator=rng()))


# --- the registry ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECS[: len(ATTACKS) - 1])
def test_every_entry_is_of_a_function_that_takes_its_options(name):
    entry = ATTACKS[name]
    keywords = {"eps", "norm", "seed", "on_step", *entry.options, *(["source_models"] if entry.source_models else [])}
    inspect.signature(entry.function).bind(None, None, None, **dict.fromkeys(keywords))
    assert callable(getattr(gsem.attacks, name))
    for key, default in entry.options.items():
        # What a text sets is of the default's type, so that the default as a text is the default.
        assert default is None or AttackSpec(name, {key: str(default)}).options == {key: default}


# --- the threat model --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("text", [*SPECS, "cw:form=l2:searches=2:lr=0.1"])
@settings(max_examples=8, deadline=None)
@given(
    eps=st.floats(1e-4, 2.0),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7)),
    edge=st.sampled_from([0.0, 0.5, 1.0]),
    noise=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 2**40),
)
def test_every_point_keeps_to_the_threat_model(text, norm, eps, shape, edge, noise, seed):
    if "form=l2" in text and norm == "Linf":
        return  # it is refused
    x = (torch.rand((3, *shape), generator=rng(seed)) * 2 - 1 + edge).clamp(0, 1)
    model = Linear(torch.randn((4, x[0].numel()), generator=rng(seed)))
    model = Noisy(model) if noise else model
    seen: list[Step] = []
    x_adv = attack(text, model, x, zeros(x), eps=eps, norm=norm, seed=seed, on_step=seen.append)
    assert x_adv.shape == x.shape and x_adv.dtype == x.dtype and x_adv.min() >= 0 and x_adv.max() <= 1
    if AttackSpec.parse(text).bounded:
        assert (size(x_adv, x, norm) <= eps * (1 + 1e-5) + 1e-6).all()
    for s in seen:
        assert s.x.min() >= 0 and s.x.max() <= 1
        if not text.startswith(LOOKS_OUTSIDE) and "form=l2" not in text:
            assert (size(s.x, x[s.rows], norm) <= eps * (1 + 1e-5) + 1e-6).all()


# --- what it leaves alone ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", SPECS)
def test_chance_follows_from_the_seed_and_everything_of_the_callers_is_left_alone(text):
    model, x = Noisy(linear(), 0.1), images(6)
    y = model.model(x).argmax(1)
    state, weights, copies = torch.get_rng_state(), copy.deepcopy(model.state_dict()), (x.clone(), y.clone())
    first = attack(text, model, x, y, eps=0.02, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    with torch.no_grad():
        assert torch.equal(attack(text, model, x, y, eps=0.02, seed=3), first)
    assert torch.is_grad_enabled() and not first.requires_grad
    assert torch.equal(x, copies[0]) and torch.equal(y, copies[1])
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("text", SPECS)
def test_the_random_state_is_restored_after_an_error(text):
    passes = 0

    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            nonlocal passes
            passes += len(x) >= 12  # (fewer are probed beforehand)
            if passes and (x.requires_grad or passes > 3):
                raise RuntimeError("out of memory")
            return linear()(x) + torch.rand(1)

    x, state = images(12), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="out of memory"):
        attack(text, Failing(), x, zeros(x), steps=9, queries=20)
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_on_step_gets_every_iterate_and_changes_nothing(text, noise):
    model, x = Noisy(linear(), noise), images(6)
    y = model.model(x).argmax(1)
    seen: list[Step] = []
    x_adv = attack(text, model, x, y, eps=0.02, on_step=seen.append)
    if "keep=last" not in text and text != "fgsm":  # (there the last iterate costs one more pass, with other noise)
        assert torch.equal(x_adv, attack(text, model, x, y, eps=0.02))
    assert seen
    for s in seen:
        assert s.x.shape == (len(s.rows), *x.shape[1:]) and s.loss.shape == s.wrong.shape == s.rows.shape
        assert set(s.rows.tolist()) <= set(range(6)) and s.step >= 0
        assert s.loss.isfinite().all() and s.wrong.min() >= 0 and s.wrong.max() <= 1


@pytest.mark.parametrize("text", SPECS)
def test_no_images_are_no_work(text):
    x = images(6)[:0]
    assert attack(text, linear(), x, zeros(x)).shape == x.shape


@pytest.mark.parametrize("text", [text for text in SPECS if text not in ("fgsm", "pgd:keep=last:restarts=2")])
def test_an_image_that_is_misclassified_already_stays_near_or_as_it_is(text):
    model, x = linear(), images(6)
    y = (model(x).argmax(1) + 1) % 5
    x_adv = attack(text, model, x, y)
    assert (model(x_adv).argmax(1) != y).all()
    if not text.startswith("pgd") and text != "cw":  # (PGD starts from a random point)
        assert torch.equal(x_adv, x)


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": images() * 2}, r"\[0, 1\].*gsem.normalized"),
        ({"x": images() * float("nan")}, r"must lie in \[0, 1\]"),
        ({"y": torch.zeros(16)}, "y must be 16 int64 labels"),
        ({"y": torch.full((16,), 7)}, "label 7"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"eps": float("nan")}, "eps must be positive"),
        ({"norm": "L1"}, "norm 'L1' is unknown.*'Linf' or 'L2'"),
        ({"eot": 0}, "eot must be an integer of at least 1, not 0"),
        ({"eot": True}, "eot must be an integer"),
        ({"steps": 0}, "steps must be an integer of at least 1, not 0"),
        ({"queries": 1.5}, "queries must be an integer of at least 1, not 1.5"),
        ({"restarts": 0}, "restarts must be an integer"),
        ({"targets": -1}, "targets must be an integer"),
        ({"searches": 0}, "searches must be an integer"),
    ],
)
def test_what_it_refuses(text, change, message):
    name = text.split(":")[0]
    (key,) = change
    if key in ("steps", "queries", "restarts", "targets", "searches") and key not in ATTACKS[name].options:
        return
    if (key in ("norm", "eps") and "unbounded" in text) or (key == "searches" and "form" not in text):
        return  # (without a bound there is no ball; PGD on the margin has no searches)
    arguments = {"x": images(), "y": zeros(images())} | change
    with pytest.raises(ValueError, match=message):
        attack(text, linear(), **arguments)


@pytest.mark.parametrize("text", SPECS)
def test_batchnorm_in_train_mode_is_refused_and_named(text):
    x, model = images(4), gsem.create_model("resnet10x16", in_channels=1).eval()
    model.layer1[0].bn1.train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"'layer1\.0\.bn1' is in train mode.*eval\(\)"):
        attack(text, model, x, zeros(x))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error_that_names_the_image(text, value):
    """Image 11 is behind those that every attack probes; the first images are not attacked, so that numbers shift."""
    clean, x = linear(), images()
    y = clean(x).argmax(1)
    y[:3] = (y[:3] + 1) % 5
    poisoned = x[11]

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            near = (x - poisoned).flatten(1).abs().amax(1) < 0.2
            return clean(x) + torch.where(near, value, 0.0)[:, None]

    with pytest.raises(NotFinite, match=r"image 11 of the attacked batch.*NaN or infinite"):
        attack(text, Broken(), x, y, eps=0.05)


def test_a_wrong_text_is_found_before_an_attack_runs():
    for text, message in (
        ("deepfool", "attack 'deepfool' is unknown: it is one of clean, fgsm"),
        ("pgd:stepz=3", "has no option 'stepz': it has steps, eot"),
        ("clean:steps=3", "has no option 'steps': it has none"),
        ("pgd:steps", "'steps' is not of the form option=value"),
        ("pgd:steps=ten", "steps = 'ten' is neither a number nor a fraction"),
        ("pgd:steps=1/2", "steps must be an integer, not '1/2'"),
        ("pgd:step=2/0", "step = '2/0' is neither a number"),
        ("pgd:keep=first", "keep 'first' is unknown: it is one of best, last"),
        ("pgd:loss=kl", "loss 'kl' is unknown: it is one of ce, margin, dlr, pm"),
        ("cw:form=linf", "form 'linf' is unknown: it is one of margin, l2, unbounded"),
        ("autoattack:version=custom", "version 'custom' is unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            AttackSpec.parse(text)
    with pytest.raises(ValueError, match="suite 'hard' is unknown: it is one of quick, standard"):
        suite("hard")
