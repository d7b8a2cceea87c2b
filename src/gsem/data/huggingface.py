"""Data sets from Hugging Face datasets (objects), and the names of their columns. Their package is not imported."""

from collections.abc import Mapping, Sequence
from typing import Any

from gsem.data.dataset import Dataset
from gsem.data.items import from_torch

IMAGE_COLUMNS = ("image", "img", "images", "pixel_values", "x")
LABEL_COLUMNS = ("label", "fine_label", "labels", "target", "class", "y")


def from_huggingface(
    data: Any,
    *,
    test: Any = None,
    classes: Sequence[str] | None = None,
    eps: float = 8 / 255,
    name: str | None = None,
    flip: bool = True,
    hold: bool | None = None,
    resize: int | None = None,
    image: str | None = None,
    label: str | None = None,
) -> Dataset:
    """A data set of a Hugging Face dataset, or of a dictionary of them with "train" and "test" (or "validation").

    Args:
        data: an object with `features`, `__getitem__` and `__len__`, or a mapping of such objects.
        test: the test part, where `data` is the training part alone.
        image, label: columns; default: the image column that is called image, img, …, and label, fine_label, ….
        classes: their names; default: those of the label column.
        eps, name, flip, hold, resize: as in `from_torch`.

    Raises:
        ValueError: there are no such columns or parts; otherwise as `from_torch`.
    """
    if isinstance(data, Mapping):
        if "train" not in data:
            raise ValueError(f"the dataset has no part train; its parts are: {', '.join(map(str, data)) or 'none'}")
        test = next((data[key] for key in ("test", "validation") if key in data), test)
        data = data["train"]
    columns = list(data.features)
    image = image or column(columns, IMAGE_COLUMNS, "images", "image")
    label = label or column(columns, LABEL_COLUMNS, "labels", "label")
    if missing := [key for key in (image, label) if key not in columns]:
        raise ValueError(f"the dataset has no column {missing[0]}; its columns are: {', '.join(columns)}")
    if classes is None:
        classes = getattr(data.features[label], "names", None)
    name = name or getattr(getattr(data, "info", None), "dataset_name", None) or "huggingface"
    parts = [None if part is None else _Columns(part, image, label) for part in (data, test)]
    return from_torch(parts[0], test=parts[1], classes=classes, eps=eps, name=name, flip=flip, hold=hold, resize=resize)


def is_huggingface(data: Any) -> bool:
    """Whether `from_huggingface` takes it: an object with `features`, or a mapping of such objects."""
    one = next(iter(data.values()), None) if isinstance(data, Mapping) else data
    return isinstance(getattr(one, "features", None), Mapping) and hasattr(one, "__getitem__")


def column(columns: Sequence[str], usual: Sequence[str], what: str, argument: str) -> str:
    """The first usual name among the columns.

    Raises:
        ValueError: there is none; the message lists the columns.
    """
    found = next((name for name in usual if name in columns), None)
    if found is None:
        raise ValueError(
            f"no column of {what} is found: it is called one of {', '.join(usual)}, or given as {argument}=; the "
            f"columns are: {', '.join(columns) or 'none'}"
        )
    return found


class _Columns:
    """Two columns of a dataset as items (image, label)."""

    def __init__(self, data: Any, image: str, label: str):
        self.data, self.image, self.label = data, image, label

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> tuple[Any, Any]:
        item = self.data[row]
        return item[self.image], item[self.label]

    @property
    def targets(self) -> Any:
        return self.data[self.label][:]
