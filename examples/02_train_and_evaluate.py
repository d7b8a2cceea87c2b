"""Train a small GSeM network on digits, then attack it along the semi-masked and the corrected gradient.

On this small network the two attacks do nearly the same. The one along the corrected gradient is the one to report.

    python 02_train_and_evaluate.py [EPOCHS]

EPOCHS: 8 by default. The run is kept in runs/example; a second start does not train it again.
"""

import sys

import gsem

source = gsem.data.load("digits")
epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 8
recipe = gsem.RECIPES["gcat"].scaled(epochs)


def show(p) -> None:
    if p.epoch_ended:
        print(f"epoch {p.epoch}/{p.epochs}: clean {100 * p.clean:.1f}%, robust {100 * p.robust:.1f}% (validation)")


run = gsem.train(recipe, out="runs/example", device="cpu", resume=True, on_progress=show)
print(run)
model = run.model()

test = source.test()
x, y = gsem.data.to_float(test.x[:50]), test.y[:50]
for kind in ("semi-masked", "corrected"):
    for module in model.modules():
        if isinstance(module, gsem.GSeM):
            module.gradient = kind
    result = gsem.evaluate(model, x, y, ["clean", "pgd:steps=20:eot=5"], eps=source.eps, frozen=False)
    print(f"\nattacked along the {kind} gradient:")
    print(result)
