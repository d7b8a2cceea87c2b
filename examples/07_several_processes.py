"""Train and evaluate in several processes: torchrun starts this script once for each, and all make the same calls.

    torchrun --nproc-per-node 2 07_several_processes.py [EPOCHS]

EPOCHS: 4 by default. On a machine with GPUs each process takes one of them. On a CPU each takes a share of the cores.
"""

import sys

import gsem
from gsem.distributed import current

processes = current()  # joins the others
recipe = gsem.RECIPES["gcat-fast"].scaled(int(sys.argv[1]) if len(sys.argv) > 1 else 4)
run = gsem.train(recipe, out="runs/shared", resume=True)

test = gsem.data.load("digits").test()
x, y = gsem.data.to_float(test.x[:50]), test.y[:50]
result = gsem.evaluate(run.model(), x, y, ["clean", "pgd:steps=10:eot=5"], eps=0.15, batch_size=25, frozen=False)
if processes.first:
    print(f"{processes.size} process{'es' if processes.several else ''}")
    print(run)
    print(result)
