"""The shapes and dtypes in the signatures are true: the main path runs with every annotation checked.

In a process of its own, because the checks refuse bad arguments before our own messages can, and cannot be traced.
"""

import subprocess
import sys

SCRIPT = """
import jaxtyping
jaxtyping.install_import_hook("gsem", "beartype.beartype")
from dataclasses import replace
import torch, gsem, gsem.training.awp
from gsem.attacks import pgd

torch.set_num_threads(1)
source = gsem.data.load("digits")
test = source.test()
x, y = gsem.data.to_float(test.x[:6]), test.y[:6]
for name in ("gsem-resnet10x16", "wideresnet10x2"):
    model = gsem.create_model(name, in_channels=1)
    gsem.losses.mart(model(x), model(x), y).mean().backward()
    gsem.losses.trades(model(x), model(x), y).mean().backward()
    with gsem.training.awp.awp(model, x, y, gamma=0.01):
        pass
    model.eval()
    for loss in ("ce", "margin", "dlr", "pm"):
        pgd(model, x, y, eps=0.1, step=0.05, steps=2, eot=2, restarts=2, loss=loss, keep="best")
    pgd(model, x, y, eps=1.0, step=0.5, steps=2, norm="L2", init=x)
    gsem.evaluate(model, x, y, ["clean", "pgd:steps=2:eot=2"], eps=0.1, draws=3, save_adv=True)
    for mode in ("fresh", "off", "frozen"):
        with gsem.noise(model, mode, seed=1):
            gsem.normalized(model, 0.5, [0.5])(x)
gsem.insert(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()), after="1")(torch.rand(2, 3, 8, 8))

import tempfile
few = lambda: gsem.data.Split(test.x[:200], test.y[:200])
with tempfile.TemporaryDirectory() as folder:
    for recipe in ("gcat", "trades-awp"):
        recipe = replace(gsem.RECIPES[recipe].scaled(1), rounds=1, model="gsem-resnet10x16", warmup=0.0, steps=1)
        gsem.train(recipe, out=folder + recipe.name, data=replace(source, read_train=few), device="cpu")
try:  # the hook is there
    gsem.losses.margin(torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64))
except jaxtyping.TypeCheckError:
    print("checked")
"""


def test_the_annotations_hold():
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout == "checked\n"
