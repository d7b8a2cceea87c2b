"""gsem recipes, gsem models and gsem data: the lists of recipes, networks and data sets."""

import math

from rich.console import Console
from rich.table import Table
from torch import Tensor

from gsem._text import pixels
from gsem.cli.display import show_list
from gsem.cli.options import DataOptions, NoOptions
from gsem.data import DATASETS, load
from gsem.nn.models import MODELS
from gsem.training.recipes import DESCRIPTIONS, RECIPES


def recipes_command(console: Console, o: NoOptions) -> None:
    console.print("Passes are forward-and-backward passes per image and epoch.\n")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("recipe", no_wrap=True)
    for heading in ("attack", "train", "epochs"):
        table.add_column(heading, justify="right")
    table.add_column("what")
    for recipe in RECIPES.values():
        attack, training = recipe.passes
        epochs = f"{recipe.epochs}" if recipe.rounds == 1 else f"{recipe.rounds}×{recipe.epochs}"
        table.add_row(recipe.name, f"{attack:g}", f"{training:g}", epochs, DESCRIPTIONS[recipe.name])
    console.print(table)


def models_command(console: Console, o: NoOptions) -> None:
    show_list(console, "model", MODELS)
    console.print("\nThe paper's names, like GSeMResNet18, are accepted too.")


def data_command(console: Console, o: DataOptions) -> None:
    if o.data is None:
        show_list(console, "data", DATASETS)
        console.print(
            "\nA path is accepted too: of an image folder, an .npz file, a folder of .npy, parquet or arrow files."
        )
        return
    source = load(o.data, resize=o.resize)
    shape = "×".join(map(str, source.shape))
    console.print(f"{source.name}: {source.description}")
    console.print(
        f"images {shape}, eps {pixels(source.eps)}, {len(source.classes)} classes: {', '.join(source.classes)}"
    )
    if source.read_train is not None:
        training, validation = source.training()
        held = "held in memory" if isinstance(training.x, Tensor) else "streamed: read during the training"
        size = math.prod(training.x.shape) / 2**20
        console.print(
            f"training {len(training)} and validation {len(validation)} images; {size:,.1f} MiB to train on, {held}"
        )
    if source.read_test is not None:
        console.print(f"test {len(source.test())} images")
