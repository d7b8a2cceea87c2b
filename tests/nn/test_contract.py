"""What evaluate, audit, verify and the attacks ask of a model, its images and labels, and how they say it."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gsem
from gsem.attacks import apgd, fab, fgsm, pgd, rays, square
from gsem.auditing.audit import audit
from gsem.cli.main import main
from gsem.evaluation.evaluate import evaluate
from gsem.evaluation.verify import verify
from gsem.nn.contract import NoGradient, Scores
from planted import Halves, halves, small_net

HOW = {"eps": 0.1, "step": 0.03, "steps": 3}


class Holding(nn.Module):
    """`Halves`, whose logits are held by something else."""

    def __init__(self, hold):
        super().__init__()
        self.net, self.hold = Halves(), hold

    def forward(self, x: Tensor):
        return self.hold(self.net(x))


HOLDERS = {
    "SimpleNamespace: its .logits are": lambda z: SimpleNamespace(logits=z, features=z),
    r"dict: its \['logits'\] are": lambda z: {"loss": z.sum(), "logits": z},
    "tuple: its first element is": lambda z: (z, -z),
}


class Detached(nn.Module):
    """Weights have a gradient, images have none."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * Halves()(x.detach())


# --- what a model returns ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:fold runs")
@pytest.mark.parametrize("message", HOLDERS)
def test_logits_are_taken_from_what_holds_them_and_that_is_said(message):
    x, y = halves(12)
    model = Holding(HOLDERS[message])
    plain = evaluate(Halves(), x, y, ["pgd:steps=3", "square:queries=20"], eps=0.3, save_adv=True)
    with pytest.warns(UserWarning, match=f"the model returns a {message} taken for the logits") as caught:
        held = evaluate(model, x, y, ["pgd:steps=3", "square:queries=20"], eps=0.3, save_adv=True)
    assert sum("taken for the logits" in str(w.message) for w in caught) == 1
    for one, other in zip(plain.scores, held.scores, strict=True):
        assert (one.x_adv == other.x_adv).all() and (one.correct == other.correct).all()
    with pytest.warns(UserWarning, match="taken for the logits"):
        assert all(v.problems == [] for v in verify(held, model, x, y))
    with pytest.warns(UserWarning, match="taken for the logits"):
        found = audit(model, x, y, "pgd:steps=2", eps=0.1, only=["randomness"])
    assert found.metadata["classes"] == 3
    for attack, how in ((pgd, HOW), (apgd, {"eps": 0.1, "steps": 2}), (rays, {"eps": 0.1, "queries": 9})):
        with pytest.warns(UserWarning, match="taken for the logits"):
            assert torch.equal(attack(model, x, y, **how), attack(Halves(), x, y, **how))


def test_probabilities_are_named():
    x, y = halves(12)
    model = nn.Sequential(Halves(), nn.Softmax(1))
    for ask in (
        lambda: evaluate(model, x, y, "clean", eps=0.1),
        lambda: pgd(model, x, y, **HOW),
        lambda: audit(model, x, y, "pgd:steps=2", eps=0.1, only=["randomness"]),
    ):
        with pytest.warns(UserWarning, match="returns probabilities, not logits: take off its softmax") as caught:
            ask()
        assert caught[0].filename == __file__  # at the caller's line
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(nn.Sequential(Halves(), nn.LogSoftmax(1)), x, y, "clean", eps=0.1)


def test_a_sigmoid_at_the_end_is_named():
    x, y = halves(12)
    with pytest.warns(UserWarning, match=r"logits of the first 8 images lie in \[0, 1\], as behind a sigmoid"):
        evaluate(nn.Sequential(Halves(), nn.Sigmoid()), x, y, "clean", eps=0.1)


def test_labels_that_start_at_one_are_named():
    x, y = halves(12)
    with pytest.raises(ValueError, match="label 3, but the model has 3 classes; labels start at 0: take y - 1"):
        evaluate(Halves(), x, y * 2 + 1, "clean", eps=0.1)


def test_what_is_taken_for_logits_is_said_with_its_shape():
    x, y = halves(12)
    with pytest.warns(UserWarning, match=r"its first element is taken for the logits, \[8, \d\d+\] for 8 images"):
        evaluate(Holding(lambda z: (z.repeat(1, 9), z)), x, y, "clean", eps=0.1)


def test_a_model_that_writes_to_its_images_is_refused_and_the_images_are_kept():
    class Scaling(Halves):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(2).sub_(1))

    x, y = halves(12)
    before = x.clone()
    for ask in (lambda m: evaluate(m, x, y, "clean", eps=0.1), lambda m: square(m, x, y, eps=0.1, queries=3)):
        with pytest.raises(ValueError, match=r"the model changes its images in place .*x.clone\(\)"):
            ask(Scaling())
    assert torch.equal(x, before)


def test_batch_statistics_in_eval_mode_are_named():
    x, y = halves(12)
    model = nn.Sequential(nn.BatchNorm2d(x.shape[1], track_running_stats=False), Halves()).eval()
    with pytest.warns(UserWarning, match=r"BatchNorm layer '0' keeps no running statistics .*images of its batch"):
        evaluate(model, x, y, "clean", eps=0.1)


def test_a_step_in_grey_levels_is_refused():
    x, y = halves(4)
    with pytest.raises(ValueError, match=r"step = 2, but images lie in \[0, 1\]: at most 1 \(2/255, not 2\)"):
        evaluate(Halves(), x, y, "pgd:steps=2:step=2", eps=0.1)
    evaluate(Halves(), x, y, "pgd:steps=1:step=2", eps=3.0, norm="L2")


@pytest.mark.parametrize(
    ("hold", "message"),
    [
        (lambda z: z[:, :, None, None], r"returns torch.float32 \[8, 3, 1, 1\], not floating-point logits \[8, k\]"),
        (lambda z: z.argmax(1)[:, None, None], r"returns torch.int64 \[8, 1, 1\]"),
        (lambda z: z[:, 0], r"returns torch.float32 \[8\].*two by torch.stack\(\[-z, z\], 1\)"),
        (lambda z: {"out": z}, "returns a dict with the keys 'out', not logits"),
        (lambda z: None, "returns a NoneType, not logits"),
        (lambda z: z[:, :1], r"one logit .* torch.cat\(\[-z, z\], 1\)"),
        (lambda z: z[:, :2] / torch.arange(len(z))[:, None].sub(3), "image 3: the model's logits are not finite"),
    ],
)
def test_what_is_no_logits_of_the_labels_is_refused(hold, message):
    x, y = halves(12)
    for ask in (lambda m: evaluate(m, x, y, "clean", eps=0.1), lambda m: square(m, x, y, eps=0.1, queries=3)):
        with pytest.raises(ValueError, match=message):
            ask(Holding(hold))


# --- gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:fold runs")
def test_without_a_gradient_black_box_attacks_alone_evaluate():
    x, y = halves(12)
    with pytest.raises(NoGradient, match=r"no gradient .*gsem.straight_through.*square and rays"):
        evaluate(Detached(), x, y, "square:queries=10,pgd:steps=2", eps=0.1)
    result = evaluate(Detached(), x, y, "square:queries=10,rays:queries=10", eps=0.4)
    assert result.expected("clean").mean == 1 and len(result.scores) == 3
    for ask in (lambda: pgd(Detached(), x, y, **HOW), lambda: fab(Detached(), x, y, eps=0.1, steps=2)):
        with pytest.raises(NoGradient, match=r"no gradient with respect to its images"):
            ask()


@pytest.mark.filterwarnings("ignore:fold runs", "ignore:the model returns")
@pytest.mark.parametrize("hold", [lambda z: z.argmax(1), lambda z: (z * 1000).long()], ids=["classes", "scores"])
def test_integers_are_attacked_without_a_gradient(hold):
    x, y = halves(12)
    with pytest.warns(UserWarning, match="which have no gradient: black-box attacks alone"):
        result = evaluate(Holding(hold), x, y, "rays:queries=100", eps=0.4)
    assert result.expected("clean").mean == 1 and result.expected("worst").mean < 0.5
    with pytest.raises(NoGradient):
        evaluate(Holding(hold), x, y, "pgd:steps=2", eps=0.1)


def test_an_answer_that_is_no_class_of_the_labels_has_a_column_of_its_own():
    class Classes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([0, 2, 7, -1])

    assert Scores(Classes(), 3)(torch.zeros(4, 1, 1, 1)).argmax(1).tolist() == [0, 2, 3, 3]


def test_inference_mode_is_named_where_it_takes_the_gradient():
    x, y = halves(4)
    with torch.inference_mode(), pytest.raises(NoGradient, match=r"inside torch.inference_mode\(\)"):
        pgd(Halves(), x, y, **HOW)
    with torch.no_grad():  # this one does not matter
        assert not torch.equal(pgd(Halves(), x, y, **HOW), x)


def test_a_gradient_of_zero_is_said_before_the_attacks():
    class Rounded(Halves):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward((x * 7).round() / 7)

    x, y = halves(12)
    with pytest.warns(UserWarning, match=r"zero at each of the first 8 images.*straight_through.*square and rays"):
        evaluate(Rounded(), x, y, "pgd:steps=2", eps=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(Rounded(), x, y, "square:queries=5", eps=0.1)


# --- images, labels, radii ---------------------------------------------------------------------------------------


def test_numpy_arrays_and_radii_as_text_are_taken(tmp_path):
    model, (x, y) = small_net(), halves(6)
    images, labels = x.numpy().astype(np.float64), y.numpy().astype(np.uint8)
    for attack, how in (
        (pgd, {"step": "2/255", "steps": 2}),
        (square, {"queries": 3}),
        (fab, {"steps": 1}),
        (fgsm, {}),
    ):
        plain = how | {key: 2 / 255 for key in how if key == "step"}
        assert torch.equal(attack(model, images, labels, eps="8/255", **how), attack(model, x, y, eps=8 / 255, **plain))
    result = evaluate(model, images, labels, "pgd:steps=1", eps="8/255", save_adv=True)
    assert result.metadata["eps"] == 8 / 255
    plain = evaluate(model, x, y, "pgd:steps=1", eps=8 / 255, save_adv=True)
    assert (result["pgd1-eot1"].x_adv == plain["pgd1-eot1"].x_adv).all()
    assert [v.problems for v in verify(result, model, images, labels)] == [[], []]
    assert audit(model, images, labels, "pgd:steps=1", eps="8/255", only=["randomness"]).metadata["eps"] == 8 / 255


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (255 * halves(4)[0]).byte()}, r"x holds torch.uint8.*divide by 255"),
        ({"x": (255 * halves(4)[0]).byte().numpy()}, r"x holds torch.uint8.*divide by 255"),
        ({"x": 255 * halves(4)[0]}, r"not \[\d+.*\]; divide them by 255"),
        ({"x": 2 * halves(4)[0] - 1}, r"gsem.normalized"),
        ({"x": 1.001 * halves(4)[0] / halves(4)[0].max()}, r"x.clamp\(0, 1\)"),
        ({"x": halves(4)[0].where(torch.arange(4)[:, None, None, None] != 2, torch.nan)}, "image 2 holds a pixel that"),
        ({"x": halves(4)[0].tolist()}, "a tensor or a numpy array, not a list"),
        ({"x": halves(4)[0][0]}, r"one image becomes a batch by x\[None\]"),
        ({"y": F.one_hot(halves(4)[1], 3)}, r"one-hot labels take y.argmax\(1\)"),
        ({"y": [0, 1, 0, 1]}, "y must be 4 labels, a tensor or a numpy array, not a list"),
        ({"y": np.zeros(4)}, "int64 labels, not torch.float64"),
        ({"y": torch.tensor([0, 1, 0, 3])}, "image 3 has label 3, but the model has 3 classes"),
        ({"eps": "8/0"}, "eps = '8/0' is neither a number nor a fraction like '8/255'"),
        ({"eps": "8"}, r"it must be at most 1 \(8/255, not 8\)"),
    ],
)
def test_what_is_no_image_label_or_radius_is_refused(change, message):
    x, y = halves(4)
    with pytest.raises(ValueError, match=message):
        evaluate(**({"model": Halves(), "x": x, "y": y, "attacks": "clean", "eps": 0.1} | change))


def test_a_model_that_does_not_run_on_the_images_is_named_with_their_shape():
    y = halves(4)[1]
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten())
    for ask in (lambda x: evaluate(model, x, y, "clean", eps=0.1), lambda x: pgd(model, x, y, **HOW)):
        with pytest.raises(
            ValueError, match=r"does not run on images \[4, 8, 8, 1\] \(torch.float32, cpu\): RuntimeError"
        ):
            ask(torch.rand(4, 8, 8, 1))
        with pytest.raises(ValueError, match=r"Are the images \[b, h, w, c\]\? x.permute\(0, 3, 1, 2\) makes them"):
            ask(torch.rand(4, 8, 8, 1))


# --- modes -------------------------------------------------------------------------------------------------------


class Functional(nn.Module):
    """It drops features without a Dropout layer."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Dropout(0.5), r"Dropout layer '0' is in train mode.*model.eval\(\)"),
        (nn.Dropout2d(0.5), r"Dropout2d layer '0' is in train mode"),
        (Functional(), r"layer '0' \(Functional\) is in train mode, where its output differs"),
    ],
)
def test_a_layer_in_train_mode_that_drops_features_is_named(layer, message):
    x, y = halves(4)
    model = nn.Sequential(layer, Halves())
    for ask in (
        lambda: evaluate(model, x, y, "clean", eps=0.1),
        lambda: pgd(model, x, y, **HOW),
        lambda: audit(model, x, y, eps=0.1, only=["randomness"]),
        lambda: gsem.reporting.visuals.pictures(model, x, y, eps=0.1),
    ):
        model.train()
        with pytest.raises(ValueError, match=message):
            ask()
        assert model.training and layer.training
    evaluate(model.eval(), x, y, "clean", eps=0.1)
    evaluate(nn.Sequential(nn.Dropout(0.0), nn.ReLU(), Halves()).train(), x, y, "clean", eps=0.1)


def test_the_check_draws_from_no_stream_of_the_callers():
    model, (x, y) = gsem.create_model("gsem-resnet10x16", in_channels=1).eval(), halves(4)
    noise = model.gsem_module.offsets
    before = torch.get_rng_state()
    with gsem.noise(model, "fresh", seed=3):
        pgd(model, x, y, **HOW, keep="last")
        assert int(noise.key[1]) == HOW["steps"]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings("ignore:fold runs", "ignore::DeprecationWarning")
def test_a_torchscript_model_is_evaluated_like_the_network_that_it_was_made_from():
    net, (x, y) = small_net(), halves(6)
    traced = torch.jit.trace(net, x[:2])
    one, other = (evaluate(model, x, y, "pgd:steps=2", eps=0.1, save_adv=True) for model in (net, traced))
    np.testing.assert_allclose(one["pgd2-eot1"].x_adv, other["pgd2-eot1"].x_adv, atol=1e-4)


def test_a_function_is_no_model():
    x, y = halves(4)
    with pytest.raises(ValueError, match=r"the model must be a torch.nn.Module, not a function"):
        evaluate(lambda x: x, x, y, "clean", eps=0.1)


# --- where the user meets it -------------------------------------------------------------------------------------


def test_the_command_line_says_it_in_a_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "softnet.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Softmax(1))\n"
    )
    torch.manual_seed(0)
    words = "evaluate softnet:net --data digits --images 20 --attacks clean --out soft"
    assert main(words.split()) == 0
    assert "the model returns probabilities, not logits" in capsys.readouterr().err
