"""What bf16 gradient directions cost an attack: PGD-20 alone, searched on the float32 and on the bf16 folded model.

    python benchmarks/search_precision.py RUN --data DATA [--images 500] [--seeds 3]

The noise of the model is frozen, anew for each seed, so that only the directions differ; the last iterate is scored
by the model itself in float32. Misclassified clean images count as broken. Prints the share broken per seed.
"""

import argparse

import torch

import gsem
from gsem.attacks import pgd
from gsem.nn.predict import BATCH


def broken(model: torch.nn.Module, search: torch.nn.Module, x, y, eps: float, seed: int) -> float:
    parts = zip(x.split(BATCH), y.split(BATCH), strict=True)
    how = {"eps": eps, "step": eps / 4, "steps": 20, "keep": "last"}
    x_adv = torch.cat([pgd(search, xs, ys, **how, seed=seed) for xs, ys in parts])
    with torch.no_grad():
        return (model(x_adv).argmax(1) != y).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--data", required=True)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    model, meta = gsem.load_model(options.run)
    test = gsem.data.load(options.data).test()
    x, y = gsem.data.to_float(test.x[: options.images]), test.y[: options.images]
    models = [gsem.fold(model, dtype) for dtype in (torch.float32, torch.bfloat16)]
    print(f"{options.run}, {len(x)} images of {options.data}, torch {torch.__version__}")
    print("seed  float32    bf16")
    for seed in range(options.seeds):
        with gsem.noise(model, "frozen", seed=seed):
            shares = [broken(model, folded, x, y, meta["data"]["eps"], seed) for folded in models]
        print(f"{seed:4}   {shares[0]:6.1%}  {shares[1]:6.1%}", flush=True)


if __name__ == "__main__":
    main()
