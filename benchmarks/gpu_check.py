"""`gpu.py check`: folded model, noise, attack, training step and precisions on the device, against CPU float64.

Every check is one line, and all of them run: one that fails does not stop the others.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest import mock

import reference
import torch
from gpu_report import Report
from timing import tf32, tf32_settings
from torch import Tensor, nn

import gsem
from gsem.attacks._core import expected_gradient, random_start
from gsem.data import Dataset, Split
from gsem.losses import cross_entropy
from gsem.nn.folded import fold
from gsem.rng import derive_seed, generator
from gsem.training import cuda_graph
from gsem.training.recipes import Recipe
from gsem.training.step import Stepper

EPS = 8 / 255
NETWORK = "gsem-resnet10x16"
LEAD = 25.0  # of the label's logit: the others' probabilities, exp(-25), are far below what fp16 can hold, 6e-8


@dataclass(frozen=True)
class Case:
    """Where the checks run, and how large they are."""

    device: torch.device
    images: int
    side: int

    def pixels(self) -> Tensor:
        rng = torch.Generator().manual_seed(1)
        return torch.randint(0, 256, (self.images, 3, self.side, self.side), generator=rng, dtype=torch.uint8)

    def source(self) -> Dataset:
        labels = torch.arange(self.images, device=self.device) % 10
        split = Split(self.pixels().to(self.device), labels)
        shape = (3, self.side, self.side)
        return replace(gsem.data.load("digits"), shape=shape, read_train=lambda: split, read_test=lambda: split)

    def recipe(self, **fields: object) -> Recipe:
        small = {"model": NETWORK, "steps": 2, "eot": 3, "draws": 2, "augment": "none"} | fields
        return replace(gsem.RECIPES["gcat-published"], **small)


def network(device: torch.device, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = gsem.create_model(NETWORK)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.running_mean, std=0.5)
    return model.to(device, dtype).eval()


def gradient(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    logits = model(x)
    (grad,) = torch.autograd.grad(logits.square().sum(), x)
    return logits.detach(), grad


def difference(one: Tensor, other: Tensor) -> float:
    """The largest, relative to the largest element of `other`."""
    one, other = one.detach().double().cpu(), other.detach().double().cpu()
    return float((one - other).abs().max() / other.abs().max())


def folded_models(report: Report, case: Case) -> None:
    device, x = case.device, case.pixels().double() / 255
    with gsem.noise(cpu := network(torch.device("cpu"), torch.float64), "frozen", seed=3):
        logits, grad = gradient(cpu, x)
    model = network(device, torch.float64)
    with gsem.noise(model, "frozen", seed=3):
        found = gradient(model, x.to(device))
        report.at_most("float64 logits on the device and on the CPU", difference(found[0], logits), 1e-9)
        report.at_most("float64 gradients on the device and on the CPU", difference(found[1], grad), 1e-9)
        folded = fold(model, torch.float64)
        folded_grad = gradient(folded, x.to(device))[1]
        report.at_most("float64 folded model's gradients and the model's", difference(folded_grad, grad), 1e-9)
        second = folded.logits_of_draws(x.to(device), 3)[len(x) : 2 * len(x)]
        report.at_most("the second of three draws at once, and one draw", difference(second, logits), 1e-9)
    with gsem.noise(cpu, "off"):
        truth = gradient(cpu, x)
    single = network(device, torch.float32)
    with gsem.noise(single, "off"), tf32(False):
        logits, _ = gradient(fold(single), x.float().to(device))
        report.at_most("float32 folded model's logits and CPU float64", difference(logits, truth[0]), 2e-3)


def training_step(report: Report, case: Case) -> None:
    """Weights after one step in float64, ours and the slow reference's."""
    device, source = case.device, case.source()
    recipe = case.recipe(precision="float32", attack_precision="float32")
    fast, slow = network(device, torch.float64), network(device, torch.float64)
    stepper = Stepper(recipe, source, EPS, fast, None)
    stepper.folded = fold(fast, torch.float64)
    stepper._augmented = lambda x, *_: x.double() / 255  # type: ignore[method-assign]
    optimizer = torch.optim.SGD(slow.parameters(), recipe.learning_rate(0.0), momentum=0.9, weight_decay=3.5e-3)
    images = source.test()
    x = images.x.double() / 255
    seed = derive_seed(recipe.seed, "attack", 0)
    start = random_start(x[1::2], EPS, "Linf", generator(seed, "start", 0, device=device))
    with gsem.noise(fast, "frozen"), gsem.noise(slow, "frozen"):
        stepper(images.x, images.y, step=0, epoch=0.0, averaged=None)
        reference.step(slow, optimizer, x, images.y, start, eps=EPS, steps=2, eot=3, draws=2)
    pairs = zip(fast.parameters(), slow.parameters(), strict=True)
    report.at_most("weights after a step, and the slow reference's", max(difference(a, b) for a, b in pairs), 1e-5)


def confident(device: torch.device) -> nn.Module:
    """A network that answers class 0 for every image, by a lead of about `LEAD`."""
    model = network(device, torch.float32)
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        last.weight /= 10 * last.weight.abs().max()
        last.bias.zero_()
        last.bias[0] = LEAD
    return model


def low_precision_gradients(report: Report, case: Case) -> None:
    """On images that the network is sure of, the cross-entropy has a tiny gradient, which fp16 must not round to 0.

    Compared with float32, since the gradient of the loss itself is float32 in all of them.
    """
    x, y = case.pixels().float() / 255, torch.zeros(case.images, dtype=torch.int64)
    model = confident(torch.device("cpu"))
    with gsem.noise(model, "off"):
        truth = expected_gradient(model, x, y, cross_entropy, 1)[2].flatten(1).double()
    for name, dtype, most in (("fp16", torch.float16, 0.02), ("bf16", torch.bfloat16, 0.1)):
        with gsem.noise(model := confident(case.device), "off"):
            folded = fold(model, dtype)
            found = expected_gradient(folded, x.to(case.device), y.to(case.device), cross_entropy, 1)[2]
        found = found.double().cpu().flatten(1)
        vanished = float((~(found.abs() > 0).any(1)).double().mean())  # NaN counts, too
        report.at_most(f"{name} search: share of confident images without a gradient", vanished, 0.0)
        lengths = [grad.norm(dim=1).clamp_min(1e-300) for grad in (found, truth)]
        cosine = (found * truth).sum(1) / lengths[0] / lengths[1]
        report.at_most(f"{name} search: 1 − cosine to the float32 gradient, mean", float(1 - cosine.mean()), most)


class Watched(nn.Module):
    """`model`, and whether TF32 was allowed at each of its forward passes."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.allowed: list[bool] = []
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Tensor):  # the folded model is made by a symbolic pass
            self.allowed.append(any(setting in (True, "tf32") for setting in tf32_settings()))
        return self.model(x)


def tf32_restored(report: Report, case: Case) -> None:
    """The caller's TF32 settings are found again after evaluation, attack and training; while scoring, TF32 is off."""
    source = case.source()
    x, y = source.test().x.float() / 255, source.test().y
    for allowed in (True, False):
        word = "on" if allowed else "off"
        with tf32(allowed):
            former = tf32_settings()
            model = network(case.device, torch.float32)
            watched = Watched(model)
            gsem.evaluate(watched, x, y, "clean,pgd:steps=1:eot=1", eps=EPS, draws=2, frozen=False)
            after = [tf32_settings() != former]
            gsem.attacks.pgd(model, x, y, eps=EPS, step=EPS / 4, steps=1)
            after.append(tf32_settings() != former)
            stepper = Stepper(case.recipe(steps=1, eot=1, draws=1), source, EPS, model, None)
            stepper(source.test().x, y, step=0, epoch=0.0, averaged=None)
            after.append(tf32_settings() != former)
        report.at_most(f"TF32 {word} before: calls of three that changed it", float(sum(after)), 0.0)
        if allowed and case.device.type == "cuda":
            report.at_most("TF32 on before: forward passes of an evaluation in TF32", float(sum(watched.allowed)), 0.0)


@contextmanager
def _fused_everywhere() -> Iterator[None]:
    """Ours is fused on GPUs only; here on a CPU too, so that the check means something there."""
    plain = torch.optim.SGD
    with mock.patch.object(torch.optim, "SGD", lambda *words, **options: plain(*words, **options | {"fused": True})):
        yield


def sgd_after_overflow(report: Report, case: Case) -> None:
    """Fused SGD under a GradScaler whose first step overflows, beside plain SGD on the gradients of the second.

    New memory is filled with NaN meanwhile: a momentum that nobody set shows.
    """
    fast, plain = (network(case.device, torch.float32) for _ in range(2))
    recipe = case.recipe(precision="fp16", attack_precision="float32", clip=None)
    former = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with _fused_everywhere():
        stepper = Stepper(recipe, case.source(), EPS, fast, None)
        stepper.dtype = torch.float16  # a CPU's fp16 is another precision
        stepper.new_optimizer()
    lr = stepper.optimizer.param_groups[0]["lr"]
    slow = torch.optim.SGD(plain.parameters(), lr, momentum=0.9, weight_decay=3.5e-3, fused=False, foreach=False)
    rng = torch.Generator().manual_seed(5)
    grads = [torch.randn(p.shape, generator=rng).to(case.device) for p in plain.parameters()]
    loss = torch.ones((), device=case.device)
    stepper.scaler.scale(loss)  # the scale is made at its first use
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        for wanted in ([torch.full_like(g, float("inf")) for g in grads], grads, grads):
            scale = stepper.scaler.get_scale()
            for parameter, grad in zip(fast.parameters(), wanted, strict=True):
                parameter.grad = grad * scale
            stepper._update()
    finally:
        torch.use_deterministic_algorithms(former[0], warn_only=former[1])
    for _ in range(2):
        for parameter, grad in zip(plain.parameters(), grads, strict=True):
            parameter.grad = grad.clone()
        slow.step()
    figure = max(difference(a, b) for a, b in zip(fast.parameters(), plain.parameters(), strict=True))
    report.at_most("fused SGD after an fp16 overflow, and plain SGD", figure, 1e-5)


def attack_as_cuda_graph(report: Report, case: Case) -> None:
    """Replayed attacks and plain ones, on images and noise that differ from one to the next: the same to the bit.

    Captured also where it would not pay. Only CUDA has such graphs.
    """
    source = case.source()
    x, y = source.test().x.float() / 255, source.test().y
    former = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    for precision in ("float32", "bf16", "fp16"):
        recipe, found = case.recipe(attack_precision=precision), {}
        for how in ("auto", "off"):
            stepper = Stepper(recipe, source, EPS, network(case.device, torch.float32), None, compile=how)
            if how == "auto" and stepper.graphed is None:
                return
            try:
                torch.use_deterministic_algorithms(True, warn_only=True)
                with mock.patch.object(cuda_graph, "LAUNCH_SECONDS", 1.0):
                    found[how] = torch.cat(
                        [stepper.attack(recipe, stepper.folded, x.roll(n, 0), y, number=n) for n in range(4)]
                    )
            finally:
                torch.use_deterministic_algorithms(former[0], warn_only=former[1])
            if how == "auto":
                missing = float(stepper.compile_used != "CUDA graph")
                report.at_most(f"{precision} attack: not captured as a CUDA graph", missing, 0.0)
        differ = float((found["auto"] != found["off"]).double().mean())
        report.at_most(f"{precision} attack as a CUDA graph: pixels that differ from the plain one's", differ, 0.0)


CHECKS = {
    "folded model": folded_models,
    "training step": training_step,
    "low-precision gradients": low_precision_gradients,
    "TF32": tf32_restored,
    "SGD": sgd_after_overflow,
    "CUDA graph": attack_as_cuda_graph,
}


def run(report: Report, device: torch.device, *, images: int, side: int) -> None:
    case = Case(device, images, side)
    for name, check in CHECKS.items():
        report.attempt(name, lambda check=check: check(report, case))
