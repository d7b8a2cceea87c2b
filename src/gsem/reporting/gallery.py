"""Images before and after the attack, as PNG inside the page, and the margin around them."""

import base64
import io
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from markupsafe import Markup
from PIL import Image

from gsem._text import pixels
from gsem.reporting.figure import Figure, percent, rounded, swatch
from gsem.reporting.svg import drawing, tag
from gsem.reporting.views import RunReport, Shown, Surface


@dataclass(frozen=True)
class GalleryImage:
    """An image of the gallery, ready for a page."""

    number: str
    """`Row 412` of the data set; `Image 3` of the gallery where the row is not known."""
    x: str
    """data: URI, as the others."""
    change: str
    x_adv: str
    label: str
    before: str
    """What was answered, in words."""
    after: str
    told: str
    """Text alternative."""
    broken: bool
    small: bool
    """Few pixels, to be drawn as squares."""


def png(x: Float[np.ndarray, "c h w"]) -> str:
    """A data: URI of the image in [0, 1] (values outside are clipped); one or three channels, of others the first."""
    values = np.clip(np.rint(np.asarray(x, dtype=np.float64) * 255), 0, 255).astype(np.uint8)
    pixels_ = values.transpose(1, 2, 0) if len(values) == 3 else values[0]
    boxed = io.BytesIO()
    Image.fromarray(pixels_).save(boxed, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(boxed.getvalue()).decode()


def exhibits(entry: RunReport) -> list[GalleryImage]:
    """The gallery of a run."""
    p = entry.pictures
    return [] if p is None else [_exhibit(entry, shown, i, p.draws) for i, shown in enumerate(p.gallery)]


def choice(entry: RunReport) -> str:
    """Which images the gallery shows, a sentence."""
    p = entry.pictures
    if p is None:
        return ""
    right = sum(shown.clean_right > 0.5 for shown in p.gallery)
    drawn = " in most draws" if p.draws > 1 else ""
    rows = ", numbered by their rows in the data set" if all(shown.row is not None for shown in p.gallery) else ""
    if right == len(p.gallery):
        return f"Images that are right without an attack{drawn}, class by class{rows}."
    others = f"Images class by class{rows}: only {right} of these {len(p.gallery)} are right without an attack{drawn}"
    return f"{others}, which is all there are among {p.images}."


def _number(shown: Shown, at: int) -> str:
    return f"Image {at + 1}" if shown.row is None else f"Row {shown.row}"


def _exhibit(entry: RunReport, s: Shown, at: int, draws: int) -> GalleryImage:
    def name(label: int) -> str:
        return entry.classes[label] if label < len(entry.classes) else str(label)

    def answered(answer: int | None, right: float) -> str:
        taken = "" if answer in (None, s.label) else f"taken for {name(answer)}"
        if draws == 1:
            return "right" if right == 1 else taken or "wrong"
        count = f"right in {round(right * draws)} of {draws} draws"
        return f"{count}, mostly {taken}" if taken else count

    # The change fills the range from black to white, grey is none: its size is in the caption.
    largest = float(np.abs(s.x_adv - s.x).max())
    scale = largest or 1.0
    before, after = answered(s.clean, s.clean_right), answered(s.attacked, s.attacked_right)
    if not largest:
        # Of points that stand an attack returns that of the highest margin, and the image is one of them.
        nothing = "no point that was found comes nearer to an error than the image itself"
        stands = s.clean == s.label if s.clean is not None else s.clean_right > 0.5
        after += f"; {nothing}" if stands else "; wrong already, and not attacked"
    return GalleryImage(
        number=_number(s, at),
        x=png(s.x),
        change=png(0.5 + (s.x_adv - s.x) / (2 * scale)),
        x_adv=png(s.x_adv),
        label=name(s.label),
        before=before,
        after=after,
        told=f"{name(s.label)}; clean: {before}; attacked: {after}",
        broken=s.attacked_right < 0.5,
        small=s.x.shape[-1] < 128,
    )


def surface_figures(entry: RunReport, number: int) -> list[Figure]:
    """A map of the margin around each of a few images."""
    p = entry.pictures
    return [] if p is None else [_surface(entry, s, f"surface-{number}-{i}") for i, s in enumerate(p.surfaces)]


def _surface(entry: RunReport, s: Surface, key: str) -> Figure:
    p = entry.pictures
    assert p is not None
    shown = p.gallery[s.number]
    label = entry.classes[shown.label] if shown.label < len(entry.classes) else str(shown.label)
    broken = float((s.margin > 0).mean())
    title = f"Around {_number(shown, s.number).lower()}: {label}"
    middle = int(np.abs(s.along).argmin())
    end = int(np.abs(s.along - 1).argmin())
    says = (
        f"Margin on a plane through the image: {s.margin[middle, middle]:.2f} at the image, "
        f"{s.margin[middle, end]:.2f} at the adversarial point; broken in {percent(broken)} of the plane."
    )
    rows = tuple(
        (rounded(s.along[j]), rounded(s.along[i]), rounded(s.margin[i, j]))
        for i in range(len(s.along))
        for j in range(len(s.along))
    )
    keys = (swatch("still right", "cell right"), swatch("misclassified", "cell wrong"))
    caption = (
        f"Highest other logit less the label's, {'mean of several draws; ' if p.draws > 1 else ''}"
        f"from {s.margin.min():.1f} to {s.margin.max():.1f}; the stronger the colour, the farther from 0. "
        f"Ranges are in units of eps = {pixels(p.eps)}; the frame is where an attack may go."
    )
    header = ("towards_x_adv", "across", "margin")
    return Figure(key, title, caption, _map(key, title, says, s), header, rows, keys)


def _map(key: str, title: str, says: str, s: Surface) -> Markup:
    left, top, room = 44, 8, 200
    count = len(s.along)
    cell = room / count
    low, high = float(s.along[0]), float(s.along[-1])
    unit = (room - cell) / (high - low)

    def place(value: float) -> float:
        return (value - low) * unit + cell / 2

    parts = []
    largest = float(np.abs(s.margin).max()) or 1.0
    for (i, j), value in np.ndenumerate(s.margin):
        kind = "cell wrong" if value > 0 else "cell right"
        box = {"x": left + cell * j, "y": top + cell * (count - 1 - i), "width": cell + 0.3, "height": cell + 0.3}
        parts.append(tag("rect", **box, class_=kind, fill_opacity=0.1 + 0.9 * abs(float(value)) / largest))
    parts.append(tag("path", d=_boundary(s.margin > 0, left, top, cell), class_="boundary"))
    x0, x1, y0, y1 = left + place(-1), left + place(1), top + room - place(-1), top + room - place(1)
    parts.append(tag("path", d=f"M{x0:.1f} {y0:.1f}H{x1:.1f}V{y1:.1f}H{x0:.1f}Z", class_="ball"))
    middle = top + room - place(0)
    for value, text in ((0.0, "x"), (1.0, "x_adv")):
        parts.append(tag("circle", cx=left + place(value), cy=middle, r=3, class_="spot"))
        parts.append(tag("text", text, x=left + place(value), y=middle - 7, text_anchor="middle", class_="spot-name"))
    for value in (-1, 0, 1):
        parts.append(tag("text", f"{value:g}", x=left + place(value), y=top + room + 14, text_anchor="middle"))
        parts.append(tag("text", f"{value:g}", x=left - 5, y=top + room - place(value) + 4, text_anchor="end"))
    parts.append(
        tag("text", "towards x_adv", x=left + room / 2, y=top + room + 30, text_anchor="middle", class_="name")
    )
    up = top + room / 2
    parts.append(
        tag("text", "across", x=12, y=up, text_anchor="middle", transform=f"rotate(-90 12 {up:g})", class_="name")
    )
    return drawing(key, title, says, *parts, width=left + room + 10, height=top + room + 36)


def _boundary(broken: np.ndarray, left: float, top: float, cell: float) -> str:
    """The edges between right and misclassified cells: seen without colours too."""
    count, path = len(broken), []
    for i in range(count):
        for j in range(count):
            x, y = left + cell * j, top + cell * (count - 1 - i)
            if j + 1 < count and broken[i, j] != broken[i, j + 1]:
                path.append(f"M{x + cell:.1f} {y:.1f}v{cell:.1f}")
            if i + 1 < count and broken[i, j] != broken[i + 1, j]:
                path.append(f"M{x:.1f} {y:.1f}h{cell:.1f}")
    return "".join(path)
