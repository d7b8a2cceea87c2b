"""Arrays, map-style datasets and Hugging Face's as data sets."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Subset, TensorDataset

from gsem.data import Dataset, as_dataset, from_arrays, from_huggingface, from_torch
from gsem.data.images import Images

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 6, 5, 3), dtype=np.uint8)
LABELS = np.arange(12) % 3
EXPECTED = torch.from_numpy(PIXELS).permute(0, 3, 1, 2).contiguous()


class Items(TorchDataset):
    """(image, label) made by a function of the row; the labels are listed where `targets` is given."""

    def __init__(
        self, image=lambda row: Image.fromarray(PIXELS[row]), label=lambda row: int(LABELS[row]), n=12, **more
    ):
        self.image, self.label, self.n = image, label, n
        self.__dict__.update(more)
        self.opened = []

    def __len__(self):
        return self.n

    def __getitem__(self, row):
        self.opened.append(row)
        return self.image(row), self.label(row)


class Columns:
    """As a Hugging Face dataset: rows by number, columns by name, features."""

    def __init__(self, **columns):
        self.columns = columns
        self.features = dict.fromkeys(columns)

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key):
        return self.columns[key] if isinstance(key, str) else {name: c[key] for name, c in self.columns.items()}


def train_of(source):
    return source.whole_training()


@pytest.mark.parametrize(
    "x",
    [PIXELS, torch.from_numpy(PIXELS), EXPECTED, PIXELS.transpose(0, 3, 1, 2), EXPECTED / 255, PIXELS / 255.0],
    ids=["nhwc", "nhwc tensor", "nchw", "nchw array", "float", "float nhwc"],
)
def test_arrays_of_every_order_and_range_are_the_same_images(x):
    source = from_arrays(x, LABELS, test=(x[:3], LABELS[:3]), classes=["a", "b", "c"], eps=0.1)
    assert (source.shape, source.classes, source.eps) == ((3, 6, 5), ("a", "b", "c"), 0.1)
    assert torch.equal(train_of(source).x, EXPECTED) and train_of(source).y.tolist() == LABELS.tolist()
    assert torch.equal(source.test().x, EXPECTED[:3])
    training, validation = source.training()
    assert len(training) == 9 and validation.y.tolist() == [0, 1, 2]


def test_grey_arrays_and_memory_maps(tmp_path):
    assert from_arrays(PIXELS[..., 0], LABELS).shape == (1, 6, 5)
    np.save(tmp_path / "x.npy", PIXELS)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    streamed = train_of(from_arrays(mapped, LABELS, hold=False))
    assert isinstance(streamed.x, Images) and torch.equal(streamed.held(), EXPECTED)
    assert torch.equal(train_of(from_arrays(mapped, LABELS)).x, EXPECTED)


def test_where_both_axes_may_be_channels_the_kind_of_array_decides():
    x = np.zeros((6, 3, 3, 3), np.uint8)
    x[:, 0] = 9  # the first row of NHWC, the first channel of NCHW
    assert train_of(from_arrays(x, LABELS[:6])).x[0, :, 0].unique().tolist() == [9]
    assert train_of(from_arrays(torch.from_numpy(x), LABELS[:6])).x[0, 0].unique().tolist() == [9]


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (EXPECTED * 1.0, LABELS, r"x is float with values from \d+ to 255, but images are uint8 .* floats in \[0, 1\]"),
        ((EXPECTED / 255 - 0.5) / 0.2, LABELS, r"x is float with values from -2\.5 to 2\.5.*Normalize"),
        (torch.full((12, 3, 4, 4), float("nan")), LABELS, "values from nan to nan"),
        (EXPECTED.long(), LABELS, r"x is int64 \[12, 3, 6, 5\], but images are uint8"),
        (EXPECTED, LABELS / 1.0, r"y is float64 \[12\], but labels must be integers"),
        (EXPECTED, np.eye(3)[LABELS], r"y is float64 \[12, 3\]"),
        (EXPECTED, np.eye(3, dtype=int)[LABELS], r"y is int64 \[12, 3\]"),
        (EXPECTED, ["cat"] * 12, "y is <U3"),
        (EXPECTED, LABELS[:5], "x has 12 images, but y has 5"),
        (EXPECTED[:, 0, 0], LABELS, r"x is uint8 \[12, 5\], but must be one of \[n, c, h, w\]"),
        (EXPECTED, LABELS - 1, r"label -1, but labels are 0 … 1"),
        (EXPECTED[:0], [], "y is empty"),
    ],
)
def test_wrong_arrays_are_named(x, y, message):
    with pytest.raises(ValueError, match=message):
        from_arrays(x, y)


def test_parts_must_fit_each_other():
    with pytest.raises(ValueError, match=r"the test part has the label 3, but labels are 0 … 2 \(3 classes\)"):
        from_arrays(EXPECTED, LABELS, test=(EXPECTED, LABELS + 1))
    with pytest.raises(ValueError, match=r"test images are \[3, 4, 5\], training images \[3, 6, 5\]"):
        from_arrays(EXPECTED, LABELS, test=(EXPECTED[:, :, :4], LABELS))


@pytest.mark.parametrize("hold", [True, False])
@pytest.mark.parametrize(
    "image",
    [
        lambda row: Image.fromarray(PIXELS[row]),
        lambda row: EXPECTED[row],
        lambda row: EXPECTED[row] / 255,
        lambda row: PIXELS[row],
    ],
    ids=["PIL", "uint8", "float", "hwc"],
)
def test_items_of_every_kind_are_the_same_images(image, hold):
    source = from_torch(Items(image), test=Items(image, n=4), hold=hold)
    assert (source.name, source.shape, source.classes) == ("Items", (3, 6, 5), ("0", "1", "2"))
    part = train_of(source)
    assert isinstance(part.x, Images) != hold
    assert torch.equal(part.held(), EXPECTED) and part.y.tolist() == LABELS.tolist()
    assert torch.equal(source.test().x[:], EXPECTED[:4])


@pytest.mark.parametrize("hold", [True, False])
def test_grey_pil_images_are_read_without_a_warning(hold):
    # Their arrays are views that cannot be written. torch warns of such ones once in a process, unless asked.
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        source = from_torch(Items(lambda row: Image.fromarray(PIXELS[row, ..., 0])), hold=hold)
        assert torch.equal(train_of(source).held(), EXPECTED[:, :1])
    finally:
        torch.set_warn_always(before)


def test_listed_labels_are_used_if_they_agree_with_the_items():
    items = Items(targets=LABELS.tolist(), classes=["a", "b", "c"])
    source = from_torch(items)
    assert train_of(source).y.tolist() == LABELS.tolist() and source.classes == ("a", "b", "c")
    assert 9 not in Items(targets=LABELS.tolist()).opened
    assert train_of(from_torch(Items(targets=(LABELS + 1).tolist()))).y.tolist() == LABELS.tolist()
    assert train_of(from_torch(Items(targets=[0]))).y.tolist() == LABELS.tolist()
    subset = Subset(items, [3, 4, 5, 0])
    assert train_of(from_torch(subset)).y.tolist() == [0, 1, 2, 0]
    tensors = TensorDataset(EXPECTED, torch.from_numpy(LABELS))
    assert torch.equal(train_of(from_torch(tensors)).x, EXPECTED)


def test_streamed_items_are_read_only_when_they_are_asked_for():
    items = Items(targets=LABELS.tolist())
    part = train_of(from_torch(items, hold=False))
    items.opened.clear()
    part.x[[9, 10]]
    assert items.opened == [9, 10]


def test_items_of_mixed_sizes_are_resized_or_named():
    def image(row):
        return Image.new("RGB", (5 + row, 6), (row, row, row))

    x = train_of(from_torch(Items(image), resize=4)).x
    assert x.shape == (12, 3, 4, 4) and x[:, 0, 0, 0].tolist() == list(range(12))
    with pytest.raises(ValueError, match=r"item 1 cannot be used: it is 6 × 6 .*item 0 is 5 × 6; .*resize="):
        from_torch(Items(image))
    with pytest.raises(ValueError, match=r"item 1 has the shape \[3, 7, 5\], while item 0 has \[3, 6, 5\]"):
        from_torch(Items(lambda row: torch.zeros(3, 6 + (row == 1), 5)))
    with pytest.raises(ValueError, match=r"resize is for PIL images, and item 0 is float32"):
        from_torch(Items(lambda row: torch.zeros(3, 6, 5)), resize=4)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (Items(lambda row: EXPECTED[row] * 1.0), r"item 0 is float with values from \d+ to \d+"),
        (Items(label=lambda row: 0.5), r"the label of item 0 is 0\.5 \(float\), but labels must be integers"),
        (Items(label=lambda row: "cat"), r"the label of item 0 is 'cat' \(str\)"),
        (Items(label=lambda row: True), r"the label of item 0 is True \(bool\)"),
        (Items(label=lambda row: torch.zeros(3)), r"the label of item 0 is float32 \[3\]"),
        (Items(label=lambda row: int(row) - 1), "label -1"),
        (Items(lambda row: torch.rand(3, 6, 5)), "item 0 differs when it is read again: .*random transforms"),
        (Items(lambda row: 1 // 0), "item 0 cannot be read: ZeroDivisionError"),
        (Items(n=0), "there is no item"),
        ([torch.zeros(3, 6, 5)] * 4, r"item 0 is Tensor, but must be \(image, label\)"),
    ],
)
def test_wrong_items_are_named(items, message):
    with pytest.raises(ValueError, match=message):
        from_torch(items)


@pytest.mark.parametrize("names", [("image", "label"), ("img", "fine_label")])
def test_columns_of_huggingface_are_found(names):
    image, label = names
    columns = {"id": list("abcdefghijkl"), image: [Image.fromarray(p) for p in PIXELS], label: LABELS.tolist()}
    train = Columns(**columns, **({"coarse_label": [0] * 12} if label == "fine_label" else {}))
    train.features[label] = type("ClassLabel", (), {"names": ["a", "b", "c"]})()
    source = from_huggingface({"train": train, "test": train})
    assert source.classes == ("a", "b", "c")
    assert torch.equal(train_of(source).x, EXPECTED) and source.test().y.tolist() == LABELS.tolist()
    assert torch.equal(train_of(as_dataset(train)).x, EXPECTED)


def test_columns_that_are_not_there_are_named():
    with pytest.raises(ValueError, match=r"no column of images is found: .*the columns are: text, label"):
        from_huggingface(Columns(text=["a"], label=[0]))
    with pytest.raises(ValueError, match="no column of labels is found"):
        from_huggingface(Columns(image=["a"], caption=["x"]))
    with pytest.raises(ValueError, match="no column x; its columns are: image, label"):
        from_huggingface(Columns(image=["a"], label=[0]), image="x")
    with pytest.raises(ValueError, match="no part train; its parts are: test"):
        from_huggingface({"test": Columns(image=["a"], label=[0])})


def test_whatever_a_user_passes_is_recognised():
    source = from_arrays(EXPECTED, LABELS)
    assert as_dataset(source) is source
    assert isinstance(as_dataset((EXPECTED, LABELS)), Dataset)
    assert as_dataset(Items()).name == "Items"
    for wrong in ("digits", [1, 2], {}, EXPECTED, None):
        with pytest.raises(TypeError, match=f"data is {type(wrong).__name__}, but must be a gsem.data.Dataset"):
            as_dataset(wrong)
