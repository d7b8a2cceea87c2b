"""Randomised smoothing: radii within which no perturbation in L2 changes the answer (Cohen, Rosenfeld, Kolter 2019).

The smoothed classifier answers the class that the network answers most often under Gaussian noise on the image. If that
class has a probability of at least p > 1/2, no change of the image below sigma · Phi⁻¹(p) in L2 changes the answer.
"""

import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, inf, log2
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gsem._env import exact_float32, out_of_memory_names
from gsem._fingerprint import data_fingerprint, model_fingerprint
from gsem._io import write_atomically
from gsem._text import between, columns, percent
from gsem.distributed import current
from gsem.evaluation.partial import differences, refuse_differences
from gsem.evaluation.result import with_ending
from gsem.evaluation.statistics import Interval, clopper_pearson_lower, wilson_interval
from gsem.evaluation.work import shared_out
from gsem.nn.contract import ImagesLike, LabelsLike, plain_logits, to_images, to_labels, to_number
from gsem.nn.predict import BATCH, is_stochastic
from gsem.rng import derive_seed, seeded

ABSTAINED = -1
PER_IMAGE = ("predicted", "counts", "radius", "y", "rows")
SAVE_EVERY = 5.0  # seconds
# The metadata that decide a certification: of two files that agree in them, the figures are the same.
QUESTION = ("fingerprint", "sigma", "n0", "n", "alpha", "seed", "batch_size")


class AnotherCertification(ValueError):
    """A file holds a certification of another model, other images or other arguments, or none."""


class Certified(NamedTuple):
    """The certificate of one image."""

    predicted: int
    """The class that the smoothed classifier answers; -1 where it abstains."""
    agreeing: int
    """Estimation draws in which the network answered the selected class."""
    radius: float
    """In L2, in the unit of the images; 0 where it abstains."""


@dataclass(frozen=True, repr=False)
class CertificationResult:
    """The certificates of some images, by randomised smoothing. `print(result)` is a table."""

    predicted: Int[np.ndarray, " n"]
    """The class that the smoothed classifier answers; -1 where it abstains."""
    counts: Int[np.ndarray, " n"]
    """Estimation draws in which the network answered the selected class, of `metadata["n"]`."""
    radius: Float[np.ndarray, " n"]
    """The certified radius in L2, in the unit of the images; 0 where the smoothed classifier abstains."""
    y: Int[np.ndarray, " n"]
    rows: Int[np.ndarray, " n"]
    """Row of each image in the data set's test split."""
    metadata: dict[str, Any]
    """sigma, n0, n, alpha, seed, stochastic, fingerprint of the model and the images, versions."""

    @property
    def correct(self) -> Bool[np.ndarray, " n"]:
        """Whether the smoothed classifier answers the label. Where it abstains, it does not."""
        return self.predicted == self.y

    @property
    def abstained(self) -> float:
        """Share of images, 0 to 1, for which no class is the most probable one by this number of draws."""
        return float((self.predicted == ABSTAINED).mean())

    @property
    def mean_radius(self) -> float:
        """The mean over all images of the certified radius, which counts as 0 where the answer is not the label."""
        return float(np.where(self.correct, self.radius, 0.0).mean())

    @property
    def largest_radius(self) -> float:
        """The radius that is certified where every draw has one class: no more draws, no larger radius."""
        m = self.metadata
        return m["sigma"] * NormalDist().inv_cdf(clopper_pearson_lower(m["n"], m["n"], m["alpha"]))

    def accuracy(self, radius: float) -> Interval:
        """Certified accuracy at a radius: the share of images that are right with at least this certified radius.

        At radius 0 it is the accuracy of the smoothed classifier, an abstention being wrong. With its 95% Wilson
        interval over images.
        """
        return wilson_interval(float((self.correct & (self.radius >= radius)).mean()), len(self.y))

    def table(self, radii: Sequence[float] | None = None) -> list[tuple[float, Interval]]:
        """Radii and the certified accuracy at each; default: in steps of half a sigma, up to the largest radius."""
        if radii is None:
            step = self.metadata["sigma"] / 2
            radii = [step * i for i in range(int(self.largest_radius / step) + 1)]
        return [(radius, self.accuracy(radius)) for radius in radii]

    def to_dict(self) -> dict[str, Any]:
        """Summary and certificates, as `save` writes them."""
        return {
            "certified": [{"radius": radius, **accuracy._asdict()} for radius, accuracy in self.table()],
            "mean_radius": self.mean_radius,
            "abstained": self.abstained,
            "metadata": self.metadata,
            "images": {key: getattr(self, key).tolist() for key in PER_IMAGE},
        }

    def save(self, path: str | Path) -> Path:
        """Write `PATH.json`. PATH may carry the ending. Returns the file."""
        file = with_ending(path, ".json")
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(self.to_dict(), indent=1).encode())
        return file

    @classmethod
    def load(cls, path: str | Path) -> "CertificationResult":
        """What `save` wrote.

        Raises:
            ValueError: a file that holds no certification, or an unfinished one.
        """
        file = with_ending(path, ".json")
        found = _read(file)
        arrays = {key: np.array(found["images"][key]) for key in PER_IMAGE}
        result = cls(**arrays, metadata=found["metadata"])
        if len(result.y) < result.metadata["images"]:
            raise ValueError(f"{file} holds an unfinished certification: the same gsem certify completes it")
        return result

    def __repr__(self) -> str:
        m = self.metadata
        rows = [("L2 radius", "certified", "95% interval")]
        rows += [(f"{radius:g}", percent(a.mean), between(a.low, a.high)) for radius, a in self.table()]
        mean = f"mean certified radius {self.mean_radius:.3f}; abstained {percent(self.abstained).strip()}"
        what = f"{len(self.y)} images, sigma = {m['sigma']:g}, {m['n0']} + {m['n']} draws, alpha = {m['alpha']:g}"
        return "\n".join([f"{what}, seed {m['seed']}", *columns(rows), mean])


@exact_float32()
def certify(
    model: nn.Module,
    x: ImagesLike,
    y: LabelsLike,
    *,
    sigma: float | str,
    n0: int = 100,
    n: int = 10_000,
    alpha: float = 0.001,
    seed: int = 0,
    batch_size: int = BATCH,
    rows: Sequence[int] | Int[np.ndarray, " n"] | None = None,
    save: str | Path | None = None,
    again: bool = False,
    about: Mapping[str, Any] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> CertificationResult:
    """Certify the smoothed classifier of a model: radii in L2 within which its answer does not change.

    For each image, the class that most of `n0` draws of Gaussian noise have is selected. By `n` other draws, the
    one-sided Clopper-Pearson bound p ≤ P(the model answers that class) is computed. Where p > 1/2, the radius is
    sigma · Phi⁻¹(p); elsewhere the smoothed classifier abstains. A certificate is wrong with probability at most
    `alpha`.

    A stochastic model draws its own noise anew for every noisy image. Its smoothed classifier is the one that averages
    over both noises, and the theorem holds for it: it needs the probability of a class at every point, whatever that
    probability comes from. Noise is added to images as they are, without clipping to [0, 1].

    Args:
        model: images [b, c, h, w] → logits [b, k], in eval mode.
        x, y: images in [0, 1], and their labels; tensors or numpy arrays.
        sigma: standard deviation of the Gaussian noise, in the unit of the images; "0.25" or "64/255" is a number too.
        n0, n: selection draws and estimation draws for each image.
        alpha: the probability, in (0, 0.5), that a certificate is wrong.
        seed: of every random stream used; each image has its own. The caller's random state is not changed.
        batch_size: noisy copies of an image at once.
        rows: row of each image in the data set it is from; default: 0, 1, …, n − 1.
        save: the JSON file of the result. It is also written every few seconds meanwhile, and the same call resumes
            from there; a finished certification of the same model, images and arguments is returned.
        again: compute a certification that is there already anew.
        about: what else the result's metadata hold (values as JSON takes them).
        on_progress: called with the numbers of finished images and of all.

    Several processes share the images, as in `gsem.evaluate`.

    Returns:
        The certificates; `accuracy(radius)` is the certified accuracy.

    Raises:
        ValueError: arguments out of range; too few draws to certify anything; logits that are not finite;
            at `save`, something else (`AnotherCertification`).

    Source: Cohen, Rosenfeld, Kolter, "Certified adversarial robustness via randomized smoothing", ICML 2019.
    """
    sigma = to_number("sigma", sigma)
    processes, file = current(), None if save is None else with_ending(save, ".json")
    with processes.first_warns(), processes.together():
        _check_arguments(sigma, alpha, n0=n0, n=n, batch_size=batch_size)
        if not len(x):
            raise ValueError("there are no images to certify")
        given, x = model, to_images(x, model)
        y = to_labels(y, x)
        model = plain_logits(model, x, y)
        numbers = np.arange(len(x)) if rows is None else np.asarray(rows)
        if numbers.shape != (len(x),):
            raise ValueError(f"rows must be the rows of the {len(x)} images in their data set")
        metadata: dict[str, Any] = {
            "images": len(x),
            "fingerprint": model_fingerprint(given) | data_fingerprint((x, y)),
            "sigma": sigma,
            "n0": n0,
            "n": n,
            "alpha": alpha,
            "seed": seed,
            "batch_size": batch_size,
            "stochastic": is_stochastic(model, x[:batch_size]),
            "torch": torch.__version__,
            "machine": platform.machine(),
            "device": str(x.device),
            "seconds": 0.0,
        } | ({} if about is None else {"about": dict(about)})
    refuse_differences({key: metadata[key] for key in QUESTION})
    before, found = processes.from_first(partial(_finished, file, metadata, again))
    labels = y.cpu().numpy()

    def write(seconds: float) -> None:
        metadata["seconds"] = before + seconds
        if file is not None and processes.first and found:
            _whole(found, metadata, labels, numbers).save(file)

    work = partial(_certified, model, x, sigma=sigma, n0=n0, n=n, alpha=alpha, seed=seed, batch_size=batch_size)
    with out_of_memory_names(batch_size):
        _complete(found, work, len(x), write, on_progress)
    return _whole(found, metadata, labels, numbers)


def _check_arguments(sigma: float, alpha: float, **counts: int) -> None:
    if not 0 < sigma < inf:
        raise ValueError(f"sigma must be positive, in the unit of images in [0, 1], not {sigma}")
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha, the probability of a wrong certificate, must be between 0 and 0.5, not {alpha}")
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be an integer of at least 1, not {count!r}")
    if alpha ** (1 / counts["n"]) <= 0.5:
        least = ceil(log2(1 / alpha) + 1e-9)
        raise ValueError(
            f"n = {counts['n']} draws cannot certify anything at alpha = {alpha:g}, even if all agree: take at least "
            f"{least}, better thousands"
        )


def _complete(
    found: list[Certified],
    work: Callable[[int], Certified],
    images: int,
    write: Callable[[float], None],
    on_progress: Callable[[int, int], None] | None,
) -> None:
    """Append the certificates that are missing in `found`: each process makes one, the next ones when all are done."""
    processes = current()
    started = saved = time.monotonic()
    begun = len(found)
    try:
        while len(found) < images:
            now = range(len(found), min(len(found) + processes.size, images))
            found += shared_out(f"the images from {now.start}", [partial(work, image) for image in now])
            if on_progress is not None and processes.first:
                on_progress(len(found), images)
            if time.monotonic() - saved > SAVE_EVERY:
                write(time.monotonic() - started)
                saved = time.monotonic()
    finally:
        if len(found) > begun:
            write(time.monotonic() - started)


@torch.no_grad()
def _certified(
    model: nn.Module,
    x: Float[Tensor, "n c h w"],
    image: int,
    *,
    sigma: float,
    n0: int,
    n: int,
    alpha: float,
    seed: int,
    batch_size: int,
) -> Certified:
    """CERTIFY of the paper, for one image."""

    def counted(stream: str, draws: int) -> Int[Tensor, " k"]:
        counts, bad = torch.zeros(1, dtype=torch.int64, device=x.device), torch.zeros((), device=x.device).bool()
        with seeded(derive_seed(seed, "certify", stream, image), x.device):
            for start in range(0, draws, batch_size):
                shape = (min(batch_size, draws - start), *x.shape[1:])
                logits = model(x[image] + sigma * torch.randn(shape, dtype=x.dtype, device=x.device))
                bad |= ~logits.isfinite().all()
                counts = counts + torch.bincount(logits.argmax(1), minlength=logits.shape[1])
        if bad:
            raise ValueError(f"image {image}: the model's logits are not finite under noise of sigma = {sigma:g}")
        return counts

    selected = int(counted("selection", n0).argmax())
    count = int(counted("estimation", n)[selected])
    p = clopper_pearson_lower(count, n, alpha)
    if p <= 0.5:
        return Certified(ABSTAINED, count, 0.0)
    return Certified(selected, count, sigma * NormalDist().inv_cdf(p))


# --- files -----------------------------------------------------------------------------------------------------------


def _whole(
    found: Sequence[Certified], metadata: dict[str, Any], y: np.ndarray, rows: np.ndarray
) -> CertificationResult:
    """The certificates of the first images: of all of them, or of those that are finished."""
    predicted, counts, radius = (np.array(values) for values in zip(*found, strict=True))
    return CertificationResult(predicted, counts, radius, y[: len(found)], rows[: len(found)], metadata)


def _finished(file: Path | None, metadata: Mapping[str, Any], again: bool) -> tuple[float, list[Certified]]:
    """Of the file of this certification: the seconds that it took, and the certificates of its first images.

    Raises:
        AnotherCertification: it is the file of another certification, or of something else.
    """
    if file is None or not file.exists():
        return 0.0, []
    try:
        former = _read(file)
    except ValueError as error:
        raise AnotherCertification(f"{error}: choose another --out") from None
    then, now = ({key: found.get(key) for key in QUESTION} for found in (former["metadata"], metadata))
    if other := differences(then, now):
        raise AnotherCertification(
            f"{file} is there already, and is a different certification. It differs in: {'; '.join(other)}. Choose "
            "another --out, or move the file away"
        )
    if again:
        return 0.0, []
    images = former["images"]
    values = zip(images["predicted"], images["counts"], images["radius"], strict=True)
    return former["metadata"]["seconds"], [Certified(*one) for one in values]


def _read(file: Path) -> dict[str, Any]:
    """The content of a file of `CertificationResult.save`.

    Raises:
        FileNotFoundError: there is none. ValueError: it holds something else.
    """
    if not file.exists():
        raise FileNotFoundError(f"there is no certification {file}")
    try:
        found: dict[str, Any] = json.loads(file.read_text())
        if len({len(found["images"][key]) for key in PER_IMAGE}) == 1:
            _ = found["metadata"]["images"], found["metadata"]["sigma"], found["metadata"]["n"]
            return found
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{file} holds no certification of gsem certify, or is damaged")
