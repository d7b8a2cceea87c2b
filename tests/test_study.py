import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

import gsem
from gsem.nn.folded import fold
from gsem.study import _over_seeds, ablation, recipes, study
from planted import planted

BASE = replace(gsem.RECIPES["gcat"], epochs=1, warmup=0.0, steps=1, batch_size=128)


def test_the_ablation_is_matched():
    variants = {v.name: v for v in ablation(BASE)}
    assert list(variants) == [
        "plain",
        "convolutions only",
        "quantiser only",
        "noise only",
        "full GSeM",
        "noise only (noise off at test)",
        "full GSeM (noise off at test)",
    ]
    # everything but the parts of the module is the same
    alike = {replace(v.recipe, milestones=()) for v in variants.values()}
    neutral = {replace(r, model=BASE.model, quantiser=True, noise=4) for r in alike}
    assert neutral == {BASE}

    def size(v):
        r = v.recipe
        model = gsem.create_model(r.model, levels=r.levels, noise=r.noise, quantiser=r.quantiser)
        return sum(p.numel() for p in model.parameters())

    sizes = {name: size(v) for name, v in variants.items()}
    assert len({s for name, s in sizes.items() if name != "plain"}) == 1
    with pytest.raises(ValueError, match="resnet18"):
        ablation(replace(BASE, model="resnet18"))


def test_convolutions_only_is_a_plain_differentiable_map():
    module = gsem.GSeM(3, noise=0, quantiser=False).double().eval()
    x = torch.rand(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (x,))
    torch.testing.assert_close(module.quantise(x), x, rtol=1e-15, atol=0)


def test_noise_only_keeps_the_value_between_levels():
    module = gsem.GSeM(3, quantiser=False).double()
    x = torch.rand(2, 3, 5, 5, dtype=torch.float64)
    offset = 6 * (module.quantise(x) - x)
    torch.testing.assert_close(offset, offset.round(), rtol=0, atol=1e-12)
    assert offset.abs().max() == pytest.approx(4)


@pytest.mark.parametrize("gradient", ["corrected", "semi-masked"])
def test_the_twin_follows_without_the_quantiser(gradient):
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), gsem.GSeM(4, quantiser=False, gradient=gradient))
    net = net.double().eval()
    x = torch.rand(2, 1, 6, 6, dtype=torch.float64, requires_grad=True)
    with gsem.noise(net, "frozen"):
        folded = fold(net, torch.float64)
        torch.testing.assert_close(folded(x), net(x))
        grads = [torch.autograd.grad(m(x).square().sum(), x)[0] for m in (net, folded)]
    torch.testing.assert_close(*grads)


def test_recipes_are_all_there_and_scaled():
    variants = recipes(replace(BASE, epochs=12))
    assert [v.name for v in variants] == [name for name in gsem.RECIPES if name != "trades-generated"]
    assert {v.recipe.epochs for v in variants} == {12}
    models = {v.name: v.recipe.model for v in variants}
    assert models["gcat-published"] == "gsem-resnet10x16"
    assert models["trades"] == "resnet10x16"
    generated = recipes(replace(BASE, extra_data="x.npz", extra_share=0.5))[-1].recipe
    assert (generated.name, generated.extra_data, generated.extra_share) == ("trades-generated", "x.npz", 0.7)
    published = next(v.recipe for v in variants if v.name == "gcat-published")
    assert published.milestones == (5, 9)  # 60 and 110 of 150
    assert published.passes == gsem.RECIPES["gcat-published"].passes


def test_recipes_at_equal_cost():
    variants = {v.name: v.recipe for v in recipes(BASE, passes=60)}
    cost = {name: r.epochs * sum(r.passes) for name, r in variants.items()}
    assert variants["gcat"].epochs == 10
    assert variants["gcat-published"].epochs == variants["gcat-awp-published"].epochs == 1
    for name, passes in cost.items():
        assert abs(passes - 60) <= sum(variants[name].passes) / 2 or variants[name].epochs == 1, name


def test_the_interval_is_student_s():
    def result(share):
        correct = (np.arange(10) < 10 * share).astype(int)
        return planted(correct, 1)

    shares = [0.5, 0.7, 0.9]
    found = _over_seeds([result(s) for s in shares], "clean")
    low, high = stats.t.interval(0.95, 2, loc=0.7, scale=stats.sem(shares))
    assert found == pytest.approx((0.7, low, high))
    assert _over_seeds([result(0.5)], "clean").mean == 0.5


def test_a_study_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    variants = [v for v in ablation(BASE) if v.name.startswith("full")]
    how = {
        "seeds": 2,
        "out": tmp_path / "s",
        "attacks": ["clean", "pgd:steps=1"],  # (of more draws where the noise is on)
        "images": 20,
        "device": "cpu",
    }

    class Stopped(Exception):
        pass

    def stop(what, progress):
        if what == "full GSeM, seed 1" and progress is not None:
            raise Stopped

    with pytest.raises(Stopped):
        study(variants, **how, on_progress=stop)
    before = (tmp_path / "s/full-gsem-seed0/checkpoints/best.safetensors").stat().st_mtime_ns
    rows = study(variants, **how)
    assert (tmp_path / "s/full-gsem-seed0/checkpoints/best.safetensors").stat().st_mtime_ns == before
    assert [row["variant"] for row in rows] == ["full GSeM", "full GSeM (noise off at test)"]
    assert set(rows[0]["accuracy"]) == {"clean", "pgd1"}
    saved = json.loads((tmp_path / "s/study.json").read_text())
    assert saved[0]["accuracy"]["clean"] == list(rows[0]["accuracy"]["clean"])
    # both lines are tests of the same trainings
    assert len(list((tmp_path / "s").glob("*/checkpoints"))) == 2
