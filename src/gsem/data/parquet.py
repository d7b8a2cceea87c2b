"""Data sets in parquet or arrow files, as Hugging Face publishes them; pyarrow reads them, if it is installed."""

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from gsem._io import written_whole
from gsem.data.dataset import Dataset, Split, crop_padding
from gsem.data.decode import GREY, Layout, decoded, layout_of, opened
from gsem.data.huggingface import IMAGE_COLUMNS, LABEL_COLUMNS, column
from gsem.data.images import DamagedImage, Images, in_threads, stacked

DESCRIPTION = "parquet or arrow files with a column of images and one of labels, as Hugging Face publishes data sets"

_PARTS = {"train": ("train",), "test": ("test", "validation", "valid", "val")}  # the first that is there
_LOOKED_AT = 64  # images that decide whether all are grey
_AT_ONCE = 256  # rows


def is_parquet(path: Path) -> bool:
    """Whether `path` is a parquet or arrow file, or a folder with some, at most two folders deep."""
    return bool(path.suffix in (".parquet", ".arrow") if path.is_file() else _files(path))


def parquet(path: str | Path, resize: int | None = None) -> Dataset:
    """The images and labels in a parquet or arrow file, or in the files of a folder.

    A file is of the part (train, test, validation) that its name, or that of its folder, has in it; without one it is
    of the training part. The validation part serves as the test part if there is no test part, or one without labels
    (all -1). Images are encoded (a column of bytes, or a struct with bytes), or lists [h][w][c] or [h][w] of 0 … 255;
    labels are integers. Class names are those of Hugging Face's features, if the file has them. Images are grey if the
    first 64 are.

    Args:
        resize: bring encoded images of any sizes to `resize` × `resize`: the shorter side is resized, the centre
            cropped.

    Raises:
        FileNotFoundError: nothing is at `path`.
        ValueError: pyarrow is not installed, a file is damaged, a column is missing or not as above, or a label has no
            class.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"there is no file or directory {path}")
    files = [path] if path.is_file() else _files(path)
    if not files:
        raise ValueError(f"{path} holds no .parquet or .arrow file")
    parts = _parts(path, files)
    first = parts[next(iter(parts))]
    schema = _schema(first[0])
    label = column(schema.names, LABEL_COLUMNS, f"labels in {first[0]}", "label")
    image = _image_column(schema, first[0])
    labels = {part: _labels(found, label) for part, found in parts.items()}
    test = next((key for key in _PARTS["test"] if key in parts and int(labels[key][0].max()) >= 0), None)
    used = {"train": "train" if "train" in parts else None, "test": test}
    main = used["train"] or test or next(iter(parts))
    classes = _classes(schema, label, labels[main][0])
    layout = _layout(parts[main], image, resize)
    encoded = _is_encoded(schema.field(image).type)
    splits = {}
    for part, key in used.items():
        if key is not None:
            y, counts = labels[key]
            _check_labels(parts[key][0].parent, y, classes)
            splits[part] = partial(Split, ColumnImages(parts[key], image, layout, counts, encoded), y)
    return Dataset(
        name=path.resolve().name if path.is_dir() else path.stem,
        classes=classes,
        shape=layout.shape,
        eps=8 / 255,
        padding=crop_padding(layout.height),
        fill=128,
        flip=True,
        description=f"column {image} of {len(files)} file{'s' * (len(files) != 1)} in {path}",
        read_train=splits.get("train"),
        read_test=splits.get("test"),
    )


def _files(folder: Path) -> list[Path]:
    found = (folder.glob(f"{depth}*.{kind}") for depth in ("", "*/", "*/*/") for kind in ("parquet", "arrow"))
    # Hugging Face's own cache files beside a data set are no part of it.
    return sorted(f for files in found for f in files if not f.name.startswith((".", "cache-")))


def _parts(path: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    words = "|".join(word for words in _PARTS.values() for word in words)
    parts: dict[str, list[Path]] = {}
    for file in files:
        inside = file.name if file == path else str(file.relative_to(path))
        found = re.findall(rf"(?<![a-z])({words})(?![a-z])", inside.lower())
        parts.setdefault(found[-1] if found else "train", []).append(file)
    return dict(sorted(parts.items(), key=lambda item: item[0] != "train"))


# --- pyarrow ---------------------------------------------------------------------------------------------------


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            "parquet and arrow files are read by pyarrow, which is not installed: pip install 'gsem-torch[parquet]'"
        ) from None
    return pyarrow


def _schema(file: Path) -> Any:
    pa = _pyarrow()
    try:
        if file.suffix != ".arrow":
            return pa.parquet.read_schema(file)
        with pa.memory_map(str(file)) as mapped:
            return _arrow_reader(mapped).schema
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read, it is no {file.suffix} file or is damaged ({error})") from error


def _arrow_reader(mapped: Any) -> Any:
    """A reader for both kinds of arrow file: with and without a list of the batches at the end."""
    pa = _pyarrow()
    try:
        return pa.ipc.open_stream(mapped)
    except pa.ArrowInvalid:
        mapped.seek(0)
        return pa.ipc.open_file(mapped)


def _batches(file: Path, name: str, rows: int = _AT_ONCE) -> Iterator[Any]:
    """A column, in arrays of at most so many rows."""
    pa = _pyarrow()
    try:
        if file.suffix != ".arrow":
            with pa.parquet.ParquetFile(file) as opened_file:
                for batch in opened_file.iter_batches(rows, columns=[name]):
                    yield batch.column(0)
            return
        with pa.memory_map(str(file)) as mapped:
            reader = _arrow_reader(mapped)
            kept = reader if hasattr(reader, "__iter__") else map(reader.get_batch, range(reader.num_record_batches))
            for batch in kept:
                for start in range(0, batch.num_rows, rows):
                    yield batch.column(name).slice(start, rows)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise ValueError(f"{file}: column {name} cannot be read, the file is damaged or another ({error})") from error


def _image_column(schema: Any, file: Path) -> str:
    """The column of images: one that holds bytes or nested lists of integers, and of several the usual name."""
    fit = [field.name for field in schema if _is_encoded(field.type) or _is_list(field.type)]
    if not fit:
        kinds = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise ValueError(
            f"{file} has no column of images (encoded as bytes, or lists of integers); its columns are: {kinds}"
        )
    return column(fit, IMAGE_COLUMNS, f"images in {file}", "image") if len(fit) > 1 else str(fit[0])


def _is_encoded(kind: Any) -> bool:
    types = _pyarrow().types
    if types.is_struct(kind):
        return any(field.name == "bytes" and _is_encoded(field.type) for field in kind)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _is_list(kind: Any) -> bool:
    types, depth = _pyarrow().types, 0
    while types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind, depth = kind.value_type, depth + 1
    return depth in (2, 3) and types.is_integer(kind)


def _contents(array: Any, file: Path, first: int) -> list[bytes | np.ndarray]:
    """The encoded bytes of each row, or its pixels [c, h, w].

    Raises:
        DamagedImage: a row has no bytes, or its list is no image.
    """
    found: list[bytes | np.ndarray] = []
    for i, value in enumerate(array.to_pylist()):
        value = value.get("bytes") if isinstance(value, dict) else value
        name = f"{file}: row {first + i}"
        if value is None:
            raise DamagedImage(f"{name} has no bytes of an image (a path alone is not enough)")
        found.append(value if isinstance(value, bytes) else _listed_pixels(value, name))
    return found


def _listed_pixels(value: Any, name: str) -> np.ndarray:
    try:
        image = np.asarray(value)
    except ValueError:  # rows of several lengths
        image = np.empty(0, object)
    if image.dtype.kind not in "iu" or image.ndim not in (2, 3) or image.size == 0:
        raise DamagedImage(f"{name} is no image [h][w][c] or [h][w] of integers")
    if image.min() < 0 or image.max() > 255:
        raise DamagedImage(f"{name} has values from {image.min()} to {image.max()}, but must have 0 to 255")
    image = image[..., None] if image.ndim == 2 else image
    return np.ascontiguousarray(image.astype(np.uint8).transpose(2, 0, 1))


# --- labels and shape ------------------------------------------------------------------------------------------


def _labels(files: Sequence[Path], name: str) -> tuple[Int64[Tensor, " n"], list[int]]:
    """All labels, and how many each file has."""
    found, counts = [], []
    for file in files:
        counts.append(0)
        for array in _batches(file, name, rows=1 << 16):
            if not _pyarrow().types.is_integer(array.type) or array.null_count:
                missing = f" with {array.null_count} missing" if array.null_count else ""
                raise ValueError(f"{file}: column {name} is {array.type}{missing}, but labels must be integers")
            found.append(array.to_numpy(zero_copy_only=False).astype(np.int64))
            counts[-1] += len(array)
    y = torch.from_numpy(np.concatenate(found)) if found else torch.empty(0, dtype=torch.int64)
    if len(y) == 0:
        raise ValueError(f"{files[0]} has no rows")
    return y, counts


def _classes(schema: Any, label: str, y: Tensor) -> tuple[str, ...]:
    """By the features that Hugging Face writes into a schema, else the numbers up to the largest label."""
    written = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    names = written.get("info", {}).get("features", {}).get(label, {}).get("names")
    return tuple(map(str, names)) if names else tuple(map(str, range(int(y.max()) + 1)))


def _check_labels(where: Path, y: Tensor, classes: Sequence[str]) -> None:
    wrong = y[(y < 0) | (y >= len(classes))]
    if len(wrong):
        raise ValueError(f"{where} has the label {int(wrong[0])}, but there are {len(classes)} classes, from 0 on")


def _layout(files: Sequence[Path], image: str, resize: int | None) -> Layout:
    contents = _contents(next(_batches(files[0], image, _LOOKED_AT)), files[0], 0)
    first, name = contents[0], f"{files[0]}: row 0"
    if isinstance(first, np.ndarray):
        if resize is not None:
            raise ValueError(f"resize is for encoded images; column {image} of {files[0]} holds lists of one size")
        c, h, w = first.shape
        return Layout(c, h, w, name)
    grey = True
    for row, content in enumerate(contents):
        with opened(content, f"{files[0]}: row {row}") as found:  # type: ignore[arg-type]
            grey = grey and found.mode in GREY
    with opened(first, name) as found:
        return layout_of(found, name, grey=grey, resize=resize)


# --- images ----------------------------------------------------------------------------------------------------


class ColumnImages(Images):
    """The images of a column of parquet or arrow files.

    All of them are decoded as the files are read. Single rows of a parquet file cannot be read without many others, so
    where the images are not held, their encoded bytes are copied once, one after the other, to a file in the cache
    ($XDG_CACHE_HOME/gsem, by default ~/.cache/gsem).
    """

    def __init__(self, files: Sequence[Path], image: str, layout: Layout, counts: Sequence[int], encoded: bool):
        """`counts` are the rows of each file; `encoded` is whether they are bytes, not lists."""
        self.files, self.image, self.layout, self.encoded = list(files), image, layout, encoded
        self.last = np.cumsum(counts)
        self.shape = torch.Size((int(self.last[-1]), *layout.shape))
        self.copy: tuple[Path, np.ndarray] | None = None

    def whole(self) -> UInt8[Tensor, "n c h w"]:
        x, done = torch.empty(self.shape, dtype=torch.uint8), 0
        for file, first, contents in self._all():

            def read(rows: Sequence[int], file: Path = file, first: int = first, contents: Any = contents) -> Tensor:
                return stacked([self._pixels(contents[row], f"{file}: row {first + row}") for row in rows])

            x[done : done + len(contents)] = in_threads(read, range(len(contents)), self.layout.shape)
            done += len(contents)
        return x

    def _all(self) -> Iterator[tuple[Path, int, list[bytes | np.ndarray]]]:
        """The file, the number of the first row in it, and some rows."""
        for file in self.files:
            first = 0
            for array in _batches(file, self.image):
                yield file, first, _contents(array, file, first)
                first += len(array)

    def _pixels(self, content: bytes | np.ndarray, name: str) -> np.ndarray:
        if isinstance(content, bytes):
            return decoded(content, self.layout, name)
        if content.shape != self.layout.shape:
            shapes = f"{list(content.shape)}, while {self.layout.first} is {list(self.layout.shape)}"
            raise DamagedImage(f"{name} is [c, h, w] {shapes}; all images must have one size")
        return content

    # --- the copy ----------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Copy the encoded images, unless that was done before."""
        self._read_copy()

    def read(self, rows: Sequence[int]) -> UInt8[Tensor, "b c h w"]:
        copy, ends = self._read_copy()
        found = []
        with open(copy, "rb") as file:
            for row in rows:
                start = int(ends[row - 1]) if row else 0
                file.seek(start)
                content: bytes | np.ndarray = file.read(int(ends[row]) - start)
                if not self.encoded:
                    content = np.frombuffer(content, np.uint8).reshape(self.layout.shape)  # type: ignore[arg-type]
                found.append(self._pixels(content, self._name(row)))
        return stacked(found)

    def _name(self, row: int) -> str:
        number = int(np.searchsorted(self.last, row, side="right"))
        return f"{self.files[number]}: row {row - (int(self.last[number - 1]) if number else 0)}"

    def _read_copy(self) -> tuple[Path, np.ndarray]:
        """The copy, which is made if it is not there, and where each image ends in it."""
        if self.copy is None:
            copy = self._place()
            index = copy.with_suffix(".npy")
            if not index.exists():
                self._write(copy, index)
            self.copy = copy, np.load(index)
        return self.copy

    def _place(self) -> Path:
        """Named by what would change with the files' content."""
        stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in self.files]
        digest = hashlib.sha256(repr((stats, self.image)).encode()).hexdigest()[:16]
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "gsem"
        return cache / f"{self.files[0].stem}-{digest}.images"

    def _write(self, copy: Path, index: Path) -> None:
        copy.parent.mkdir(parents=True, exist_ok=True)
        warnings.warn(f"the images of {self.files[0].parent} are copied once to {copy}", stacklevel=2)
        ends, end = np.empty(len(self), np.int64), 0
        with written_whole(copy) as file:
            row = 0
            for _, _, contents in self._all():
                for content in contents:
                    end += file.write(content if isinstance(content, bytes) else content.tobytes())
                    ends[row], row = end, row + 1
        with written_whole(index) as file:  # last: where it is, the copy is whole
            np.save(file, ends)
