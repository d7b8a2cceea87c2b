"""Train a small GSeM network on digits for 8 epochs, then attack it along the semi-masked and the corrected gradient.

On this small network the two attacks do nearly the same. The one along the corrected gradient is the one to report.

python 02_train_and_evaluate.py        (the run is kept in runs/example; run again, it is not trained again)
"""

from dataclasses import replace

import gsem

source = gsem.data.load("digits")
recipe = replace(gsem.RECIPES["gcat"], epochs=8)


def told(p) -> None:
    if p.epoch_ended:
        print(f"epoch {p.epoch}/{p.epochs}: clean {100 * p.clean:.1f}%, robust {100 * p.robust:.1f}% (validation)")


run = gsem.train(recipe, out="runs/example", device="cpu", resume=True, report=told)
model = run.model()

test = source.test()
x, y = gsem.data.to_float(test.x[:100]), test.y[:100]
print(f"\n{len(x)} test images, L-infinity eps = {source.eps}")
for kind in ("semi-masked", "corrected"):
    for module in model.modules():
        if isinstance(module, gsem.GSeM):
            module.gradient = kind
    result = gsem.evaluate(model, x, y, ["clean", "pgd:steps=20:eot=5"], eps=source.eps)
    for scores in result.scores:
        mean, low, high = result.expected(scores.label)
        print(f"{kind:<12} {scores.label:<11} {100 * mean:5.1f}%   95% interval {100 * low:.1f} to {100 * high:.1f}")
