"""gsem certify: load model and images, certify by randomised smoothing, print, save."""

from pathlib import Path

from rich.console import Console

from gsem.cli.options import CertifyOptions
from gsem.cli.progress import CertifyBar
from gsem.cli.task import load_task, numbered
from gsem.evaluation.certify import AnotherCertification, CertificationResult, certify
from gsem.evaluation.result import with_ending


def certify_command(console: Console, o: CertifyOptions) -> CertificationResult:
    """Certify, show and save, by the options."""
    task = load_task(o)
    run = Path(o.model)
    default = run / "certification" if run.is_dir() else Path("certification")
    with CertifyBar(console, len(task.x)) as bar:
        for place in [o.out] if o.out is not None else numbered(default):
            try:
                result = certify(
                    task.model,
                    task.x,
                    task.y,
                    sigma=o.sigma,
                    n0=o.n0,
                    n=o.n,
                    alpha=o.alpha,
                    seed=o.seed,
                    batch_size=o.batch_size,
                    rows=task.rows.tolist(),
                    save=place,
                    again=o.again,
                    about=task.about(place),
                    on_progress=bar,
                )
                break
            except AnotherCertification:
                if o.out is not None:
                    raise
    console.print(f"\n{task.title}\nrandomised smoothing: {result}", soft_wrap=True)
    if result.metadata["stochastic"]:
        console.print("the smoothed classifier includes the model's own noise, drawn anew for every image")
    console.print(
        f"each certificate is wrong with probability at most {o.alpha:g}; it is one of the\n"
        "smoothed classifier, not of a single prediction of the model"
    )
    console.print(f"saved in {with_ending(place, '.json')}", soft_wrap=True)
    return result
