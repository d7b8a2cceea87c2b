"""Validation: clean and PGD-10 accuracy on held-out training images, in the recipe's norm, expected over the noise."""

from dataclasses import replace

import torch
from torch import nn

from gsem.data import Split, to_float
from gsem.distributed import current
from gsem.nn.folded import FoldedModel, fold
from gsem.nn.predict import BATCH, correct_draws, is_stochastic
from gsem.rng import derive_seed
from gsem.training.step import Stepper

STEPS = 10
DRAWS = 5


class Validator:
    """Validates the models of a training on the same held-out images, with the same random numbers each time.

    Batches are shared out among the processes. All get the accuracies of all images.
    """

    def __init__(self, stepper: Stepper, images: Split):
        self.stepper, self.images = stepper, images
        r = stepper.recipe
        self.seed = derive_seed(r.seed, "validation")
        # A single long step from noise trains well, but ten of them would be a weak attack.
        step = None if r.attack_init == "noise" else r.step
        self.recipe = replace(r, objective="ce", attack_init="uniform", steps=STEPS, step=step, eot=1)
        self.folded_average: FoldedModel | None = None

    def __call__(self, chosen: nn.Module) -> dict[str, float]:
        """Accuracies `clean` and `robust` of `chosen`; where that is the average, `raw_…` of the raw weights too."""
        found = self._accuracies(chosen)
        if chosen is not self.stepper.model:
            found |= {f"raw_{name}": value for name, value in self._accuracies(self.stepper.model).items()}
        return found

    def _accuracies(self, model: nn.Module) -> dict[str, float]:
        model.eval()
        folded = self.stepper.folded
        if model is not self.stepper.model:
            folded = self.folded_average = self.folded_average or fold(model, self.stepper.search_dtype)
        x, y = to_float(self.images.x), self.images.y
        draws = DRAWS if is_stochastic(model, x[:1]) else 1
        correct = torch.zeros(2, dtype=torch.int64, device=x.device)
        processes = current()
        with processes.together():
            for number in range(processes.rank, -(-len(y) // BATCH), processes.size):
                rows = slice(number * BATCH, (number + 1) * BATCH)
                x_adv = self.stepper.attack(self.recipe, folded, x[rows], y[rows], number=-number - 1)
                correct += torch.stack(
                    [
                        correct_draws(model, images, y[rows], draws=draws, seed=self.seed, offset=rows.start).sum()
                        for images in (x[rows], x_adv)
                    ]
                )
        processes.sum_(correct)
        clean, robust = (count / (draws * len(y)) for count in correct.tolist())
        return {"clean": clean, "robust": robust}
