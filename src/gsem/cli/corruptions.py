"""gsem evaluate --corruptions: the accuracy on corrupted images, by corruption and severity."""

from pathlib import Path

from rich.console import Console

from gsem._env import device_named
from gsem._text import percent
from gsem.cli.options import EvaluateOptions
from gsem.cli.task import load_network, numbered
from gsem.data import load_corruptions
from gsem.evaluation.corruptions import AnotherCorruptions, Cell, CorruptionResult, evaluate_corruptions


def evaluate_corruptions_command(console: Console, o: EvaluateOptions) -> CorruptionResult:
    """Measure the accuracy on corrupted images, show and save it, by the options."""
    given = [("--suite", o.suite), ("--attacks", o.attacks), ("--source", o.source or None), ("--data", o.data)]
    if wrong := [name for name, value in given if value is not None]:
        raise ValueError(
            f"--corruptions counts right answers on corrupted images, without attacks: leave out {wrong[0]}"
        )
    assert o.corruptions is not None
    model, metadata = load_network(o.model, o)
    data = metadata.get("data", {})
    corruptions = load_corruptions(o.corruptions, classes=data.get("classes"), shape=data.get("shape"))
    device, run = device_named(o.device), Path(o.model)
    default = run / "corruptions" if run.is_dir() else Path("corruptions")
    with console.status("") as status:

        def show(cell: Cell) -> None:
            status.update(f"{cell.corruption}, severity {cell.severity}: {percent(cell.accuracy).strip()}")

        for place in [o.out] if o.out is not None else numbered(default):
            file = place.with_suffix(".json")
            try:
                result = evaluate_corruptions(
                    model.to(device),
                    corruptions,
                    images=o.images,
                    draws=o.draws,
                    seed=o.seed,
                    batch_size=o.batch_size,
                    device=device,
                    save=file,
                    about={"model_name": o.model, "corruptions": str(o.corruptions)},
                    on_progress=show,
                )
                break
            except AnotherCorruptions:
                if o.out is not None:
                    raise
    console.print(f"{o.model} on {o.corruptions}, {result.cells[0].images} images of each corruption and severity")
    console.print(str(result), soft_wrap=True)
    if result.metadata["stochastic"]:
        console.print(f"expected accuracy over {o.draws} draws of the noise")
    console.print(f"saved in {file}", soft_wrap=True)
    return result
