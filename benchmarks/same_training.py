"""Does the fast training step train the same network? Ours (folded bf16 search, bf16 passes) and the slow reference
(eager float32), from the same weights, on the same batches, for some hundred steps and several seeds.

    python benchmarks/same_training.py [--data digits] [--steps 300] [--seeds 5] [--json FILE]

The noise of the networks is drawn independently, as it is in training. Prints the difference of the mean loss curves
(in blocks of 50 steps, averaged over seeds) and of the robust accuracy, with its 90% t-interval over seeds.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import reference
import torch
from torch import nn

import gsem
from gsem.attacks._core import random_start
from gsem.data import Dataset, to_float
from gsem.evaluation.statistics import t_interval
from gsem.rng import derive_seed, generator
from gsem.training.recipe import Recipe
from gsem.training.step import Stepper

BLOCK = 50


def network(recipe: Recipe, source: Dataset, layout: torch.memory_format) -> nn.Module:
    torch.manual_seed(recipe.seed)
    options = {"num_classes": len(source.classes), "in_channels": source.shape[0]}
    return gsem.create_model(recipe.model, **options).to(memory_format=layout)


def trained(side: str, recipe: Recipe, source: Dataset, o: argparse.Namespace) -> tuple[nn.Module, list[float]]:
    """The network after the steps, and the loss of every step."""
    layout = torch.channels_last if side == "ours" else torch.contiguous_format
    model, data = network(recipe, source, layout), source.training(recipe.seed)[0]
    stepper = Stepper(recipe, source, source.eps, model, None)
    momentum = {"momentum": recipe.momentum, "nesterov": recipe.nesterov, "weight_decay": recipe.weight_decay}
    optimizer = torch.optim.SGD(model.parameters(), recipe.lr, **momentum)
    rng = torch.Generator().manual_seed(recipe.seed)
    losses = []
    for number in range(o.steps):
        picked = torch.randint(len(data.x), (recipe.batch_size,), generator=rng)
        pixels, y = data.x[picked], data.y[picked]
        epoch = recipe.epochs * number / o.steps
        if side == "ours":
            stepper(pixels, y, step=number, epoch=epoch, averaged=None)
            losses.append(float(stepper.sums[0]))
            stepper.clear_sums()
        else:
            x = stepper._augmented(pixels, number).contiguous()
            seed = derive_seed(derive_seed(recipe.seed, "attack", number), "start", 0)
            start = random_start(x[1::2], source.eps, "Linf", generator(seed))
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate(epoch)
            how = {"eps": source.eps, "steps": recipe.steps, "eot": recipe.eot, "draws": recipe.draws}
            losses.append(reference.step(model, optimizer, x, y, start, **how))
    return model.eval().requires_grad_(False), losses


def robust(model: nn.Module, source: Dataset, o: argparse.Namespace) -> float:
    test = source.test()
    x, y = to_float(test.x[: o.images]), test.y[: o.images]
    result = gsem.evaluate(model, x, y, ["pgd:steps=20:eot=5"], eps=source.eps, frozen=False, draws=40)
    return result.expected(result.scores[-1].name).mean


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--model", default="gsem-resnet10x16")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0, help="to continue an earlier run")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--precision", default="bf16", help="of ours, passes and search: bf16 or float32")
    parser.add_argument("--json", type=Path, default=Path("same_training.json"))
    return parser.parse_args()


def main() -> None:
    o = arguments()
    source = gsem.data.load(o.data)
    changes = {
        "batch_size": o.batch,
        "steps": 5,
        "eot": 2,
        "draws": 2,
        "adversarial_fraction": 0.5,
        "ema": 0.0,
        "augment": "crop",
    }
    base = replace(
        gsem.RECIPES["gcat"], data=o.data, model=o.model, precision=o.precision, attack_precision=o.precision, **changes
    )
    print(f"{o.model} on {source.name}, {o.steps} steps of {o.batch}: 5 attack steps × 2 draws on half, 2 draws")
    curves: dict[str, list[list[float]]] = {"ours": [], "reference": []}
    accuracy: dict[str, list[float]] = {"ours": [], "reference": []}
    for seed in range(o.first_seed, o.first_seed + o.seeds):
        for side in curves:
            model, losses = trained(side, replace(base, seed=seed), source, o)
            curves[side].append(losses)
            accuracy[side].append(robust(model, source, o))
        print(f"seed {seed}: robust {accuracy['ours'][-1]:.1%} (ours) {accuracy['reference'][-1]:.1%}", flush=True)
    means = {side: torch.tensor(found).mean(0).split(BLOCK) for side, found in curves.items()}
    print(f"\n{'steps':<12} {'ours':>7} {'reference':>9} {'difference':>10}")
    for number, (one, other) in enumerate(zip(means["ours"], means["reference"], strict=True)):
        a, b = float(one.mean()), float(other.mean())
        print(f"{number * BLOCK:>4} – {number * BLOCK + len(one):<5} {a:7.4f} {b:9.4f} {a / b - 1:+10.2%}")
    whole = [float(torch.cat(parts).mean()) for parts in means.values()]
    print(f"all          {whole[0]:7.4f} {whole[1]:9.4f} {whole[0] / whole[1] - 1:+10.2%}")
    gaps = [100 * (a - b) for a, b in zip(accuracy["ours"], accuracy["reference"], strict=True)]
    mean, low, high = t_interval(gaps, 0.9)
    print(f"robust accuracy, ours − reference: {mean:+.2f} points, 90% interval {low:+.2f} to {high:+.2f}")
    o.json.write_text(json.dumps({"curves": curves, "accuracy": accuracy}, indent=2))


if __name__ == "__main__":
    main()
