"""On a GPU: twin, noise, attack and training step against the CPU or float64. Exits with an error where one differs.

python benchmarks/gpu_check.py [--device cuda]
"""

import argparse
from dataclasses import replace

import reference
import torch
from torch import Tensor, nn

import gsem
from gsem.attacks._core import random_start
from gsem.data import Split
from gsem.nn.folded import fold
from gsem.rng import derive_seed, generator
from gsem.training.step import Stepper

EPS = 8 / 255


def network(device: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = gsem.create_model("gsem-resnet10x16")
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


def differs(one: Tensor, other: Tensor) -> float:
    one, other = one.detach().double().cpu(), other.detach().double().cpu()
    return float((one - other).abs().max() / other.abs().max())


def check(what: str, figure: float, most: float) -> None:
    print(f"{what:<58} {figure:9.2e}  (at most {most:.0e})", flush=True)
    if not figure <= most:
        raise SystemExit(f"gpu_check: {what} differs by {figure:.3g}, at most {most:g} is rounding")


def twins(device: str) -> None:
    x = torch.rand(64, 3, 32, 32, dtype=torch.float64)
    with gsem.noise(cpu := network("cpu", torch.float64), "frozen", seed=3):
        logits, grad = gradient(cpu, x)
    model = network(device, torch.float64)
    with gsem.noise(model, "frozen", seed=3):
        for (name, found), true in zip(
            zip(("logits", "gradients"), gradient(model, x.to(device)), strict=True), (logits, grad), strict=True
        ):
            check(f"float64 {name} on the device and on the CPU", differs(found, true), 1e-9)
        folded = fold(model, torch.float64)
        check("float64 twin's gradients and the model's", differs(gradient(folded, x.to(device))[1], grad), 1e-9)
        check("… of three draws at once", differs(folded.logits_of_draws(x.to(device), 3)[64:128], logits), 1e-9)
    single = network(device, torch.float32)
    with gsem.noise(single, "off"):
        truth = gradient(single, x.float().to(device))
        check("float32 twin's logits", differs(gradient(fold(single), x.float().to(device))[0], truth[0]), 2e-3)


def step(device: str) -> None:
    torch.manual_seed(1)
    pixels = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
    images = Split(pixels.to(device), torch.arange(16, device=device) % 10)
    source = replace(gsem.data.load("digits"), shape=(3, 32, 32), read_train=lambda: images, read_test=lambda: images)
    told = {"model": "gsem-resnet10x16", "steps": 2, "eot": 3, "draws": 2, "augment": "none"}
    recipe = replace(gsem.RECIPES["gcat-published"], **told, precision="float32", attack_precision="float32")
    fast, slow = network(device, torch.float64), network(device, torch.float64)
    stepper = Stepper(recipe, source, EPS, fast, None)
    stepper.folded = fold(fast, torch.float64)
    stepper._augmented = lambda x, number: x.double() / 255  # type: ignore[method-assign]
    optimizer = torch.optim.SGD(slow.parameters(), recipe.learning_rate(0.0), momentum=0.9, weight_decay=3.5e-3)
    x = images.x.double() / 255
    seed = derive_seed(recipe.seed, "attack", 0)
    start = random_start(x[1::2], EPS, "Linf", generator(seed, "start", 0, device=torch.device(device)))
    with gsem.noise(fast, "frozen"), gsem.noise(slow, "frozen"):
        stepper(images.x, images.y, step=0, epoch=0.0, averaged=None)
        reference.step(slow, optimizer, x, images.y, start, eps=EPS, steps=2, eot=3, draws=2)
    pairs = zip(fast.parameters(), slow.parameters(), strict=True)
    check("weights after a step, and the slow reference's", max(differs(a, b) for a, b in pairs), 1e-5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    twins(device)
    step(device)


if __name__ == "__main__":
    main()
