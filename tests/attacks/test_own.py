"""An attack function of the caller's own in an evaluation: named, scored, saved and resumed like the others."""

import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import gsem
from gsem.attacks import pgd
from gsem.auditing.audit import audit
from gsem.evaluation.evaluate import evaluate
from gsem.evaluation.result import EvaluationResult
from gsem.evaluation.verify import verify
from planted import Halves, halves, small_net


def darker(model, x: Tensor, y: Tensor, *, eps: float) -> Tensor:
    return (x - eps).clamp(0, 1)


def jitter(model, x, y, *, eps, seed):
    """From torch's own stream, and in place."""
    x += eps * (2 * torch.rand_like(x) - 1)
    return x.clamp_(0, 1)


def test_functions_and_pairs_are_named_scored_and_saved_like_the_others(tmp_path):
    model, (x, y) = small_net(), halves(20)
    kept, state = x.clone(), torch.get_rng_state()
    twice = ("by-numpy", lambda model, x, y, eps: np.clip(x.numpy() + eps, 0, 1))
    saved = tmp_path / "own"
    result = evaluate(
        model, x, y, ["pgd:steps=1", darker, twice, jitter], eps=0.1, batch_size=8, save_adv=True, save=saved
    )
    assert [s.name for s in result.scores] == ["clean", "pgd1-eot1", "darker", "by-numpy", "jitter"]
    assert torch.equal(x, kept) and torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        assert (result["darker"].correct == (model((x - 0.1).clamp(0, 1)).argmax(1) == y).numpy()).all()
    assert (result["by-numpy"].x_adv == (x + 0.1).clamp(0, 1).numpy()).all()
    assert np.median(result["jitter"].linf) > 0.08
    again = evaluate(model, x, y, jitter, eps=0.1, batch_size=8, save_adv=True)
    assert (again["jitter"].x_adv == result["jitter"].x_adv).all()
    assert result.metadata["options"]["darker"] == {"function": "test_own.darker", "eot": 1}
    assert (result["worst"].selection <= result["darker"].selection).all()
    assert all(v.problems == [] for v in verify(EvaluationResult.load(saved), model, x, y))


def test_it_gets_the_keywords_that_it_takes_and_a_model_to_differentiate():
    seen = []

    def all_of_them(model, x, y, **how):
        seen.append((how, x.shape))
        x = x.requires_grad_()
        (grad,) = torch.autograd.grad(model(x).logsumexp(1).sum(), x)
        return (x + how["eps"] * grad.sign()).clamp(0, 1)

    torch.manual_seed(2)
    model, (x, y) = gsem.create_model("gsem-resnet10x16", num_classes=3, in_channels=1).eval(), halves(6)
    result = evaluate(model, x, y, [all_of_them], eps="25.5/255", draws=3, batch_size=4)
    assert [s.name for s in result.scores if not s.name.startswith("clean")] == [
        f"all_of_them{noise}" for noise in ("", "@frozen", "@off")
    ]
    assert [how["eot"] for how, _ in seen] == [20, 20, 1, 1, 1, 1]
    assert [shape[0] for _, shape in seen] == [4, 2] * 3
    assert all(how.keys() == {"eps", "norm", "seed", "eot"} and how["eps"] == 0.1 for how, _ in seen)
    assert len({how["seed"] for how, _ in seen}) == 6
    assert result["all_of_them"].gradients == 6


def test_an_attack_of_gsem_with_arguments_set_is_itself():
    model, (x, y) = small_net(), halves(8)
    short = ("short", partial(pgd, step=0.05, steps=2))
    result = evaluate(model, x, y, [short], eps=0.1, save_adv=True)
    assert result.metadata["options"]["short"]["function"] == "gsem.attacks.pgd.pgd(step=0.05, steps=2)"
    assert 0.05 < result["short"].linf.max() <= 0.1 + 1e-6


def test_what_the_documentation_shows_runs(capsys):
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    exec(re.search(r"```python\n(.*?)```", page, re.S).group(1), {})
    assert capsys.readouterr().out.startswith("Interval(mean=")


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (lambda model, x, y, eps: x + 1.01 * eps, r"attack 'own': image 0.*farther than eps = 0\.1 "),
        (lambda model, x, y, eps: x - 0.6, r"attack 'own': image 0.*left \[0, 1\]"),
        (lambda model, x, y: x * torch.nan, "attack 'own': image 0.*NaN"),
        (lambda model, x, y: None, r"attack 'own' returned a NoneType, not images \(4, 1, 4, 4\)"),
        (lambda model, x, y: x[:1], r"attack 'own' returned \(1, 1, 4, 4\), not images"),
        (lambda model, x: x, "attack 'own' cannot be called as .*too many positional arguments"),
        (lambda model, x, y, *, steps: x, "attack 'own' cannot be called as .*missing a required.* 'steps'"),
        (7, r"\('own', 7\) is no attack: give a text"),
    ],
)
def test_what_does_not_keep_to_the_contract_is_named(attack, message):
    x, y = 0.3 + 0.1 * halves(4)[0], halves(4)[1]
    with pytest.raises(ValueError, match=message):
        evaluate(Halves(), x, y, [("own", attack)], eps=0.1)


def test_names_that_no_result_can_have_are_refused():
    x, y = halves(4)
    for attack, message in (
        (lambda model, x, y: x, "'<lambda>' cannot be the name of an attack: give it one in a pair"),
        (("worst", darker), "'worst' cannot be the name"),
        (("a@b", darker), "'a@b' cannot be the name"),
        (pgd, "'pgd' is the name of an attack of gsem itself: give it one in a pair"),
        (3, "3 is no attack"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(Halves(), x, y, [attack], eps=0.1)
    with pytest.raises(ValueError, match="the same attack twice: clean, darker, darker"):
        evaluate(Halves(), x, y, [darker, darker], eps=0.1)
    with pytest.raises(ValueError, match="an audit repeats attacks with other budgets"):
        audit(Halves(), x, y, ["pgd", darker], eps=0.1)


def test_an_interrupted_evaluation_goes_on_with_the_same_function_only(tmp_path):
    calls = []

    def breaks_once(model, x, y, *, eps):
        calls.append(len(x))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return (x - eps).clamp(0, 1)

    model, (x, y) = small_net(), halves(12)
    how = {"eps": 0.1, "batch_size": 4, "save": tmp_path / "out"}
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, x, y, [("own", breaks_once)], **how)
    with pytest.raises(ValueError, match=r"It differs in: the options of own"):
        evaluate(model, x, y, [("own", darker)], **how)
    result = evaluate(model, x, y, [("own", breaks_once)], **how)
    assert calls == [4, 4, 4, 4]  # the first batch was kept
    whole = evaluate(model, x, y, [("own", darker)], eps=0.1, batch_size=4)
    assert (result["own"].correct == whole["own"].correct).all()
