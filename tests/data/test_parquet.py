"""Parquet and arrow files as Hugging Face publishes them."""

import io
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from gsem.data import load
from gsem.data.images import DamagedImage, Images

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed (the extra parquet)")
pq = pytest.importorskip("pyarrow.parquet")

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 6, 5, 3), dtype=np.uint8)
LABELS = np.arange(20) % 3
EXPECTED = torch.from_numpy(PIXELS).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def png(pixels) -> bytes:
    whole = io.BytesIO()
    Image.fromarray(pixels).save(whole, "png")
    return whole.getvalue()


def table(rows=slice(None), *, image="img", label="label", names=("a", "b", "c"), kind="struct", **columns):
    """Of those images: encoded in a struct, as bytes alone, or as nested lists."""
    pixels = PIXELS[rows]
    content = {
        "struct": lambda: [{"bytes": png(p), "path": f"{i}.png"} for i, p in enumerate(pixels)],
        "bytes": lambda: [png(p) for p in pixels],
        "lists": lambda: pa.array(pixels.tolist(), pa.list_(pa.list_(pa.list_(pa.uint8())))),
    }[kind]()
    found = pa.table({image: content, label: LABELS[rows]} | columns)
    if names:
        features = {label: {"names": list(names), "_type": "ClassLabel"}, image: {"_type": "Image"}}
        found = found.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    return found


def write(root, **parts):
    """As on Hugging Face's hub: data/PART-00000-of-0000N.parquet."""
    (root / "data").mkdir(parents=True, exist_ok=True)
    for part, tables in parts.items():
        for i, one in enumerate(tables):
            pq.write_table(one, root / "data" / f"{part}-{i:05}-of-{len(tables):05}.parquet", row_group_size=4)
    return root


@pytest.mark.parametrize("kind", ["struct", "bytes", "lists"])
def test_columns_of_images_are_held_or_streamed(tmp_path, kind):
    root = write(tmp_path / "set", train=[table(slice(0, 7), kind=kind), table(slice(7, 20), kind=kind)])
    source = load(root)
    assert (source.name, source.shape, source.classes) == ("set", (3, 6, 5), ("a", "b", "c"))
    part = source.whole_training()
    assert torch.equal(part.x, EXPECTED) and part.y.tolist() == LABELS.tolist()
    streamed = load(root, hold=False)
    with pytest.warns(UserWarning, match=r"are copied once to .*cache/gsem/train-00000-of-00002-\w+\.images"):
        unread = streamed.whole_training()
    assert isinstance(unread.x, Images)
    assert torch.equal(unread.x[[19, 0, 7]], EXPECTED[[19, 0, 7]]) and torch.equal(unread.held(), EXPECTED)
    assert load(root, hold=False).whole_training().x[[3]].equal(EXPECTED[[3]])  # copied already: no warning


@pytest.mark.parametrize("stream", [True, False])
def test_arrow_files_of_save_to_disk_are_read(tmp_path, stream):
    for part, rows in (("train", slice(0, 15)), ("test", slice(15, 20))):
        (tmp_path / "saved" / part).mkdir(parents=True)
        file = tmp_path / "saved" / part / "data-00000-of-00001.arrow"
        made = table(rows)
        new = pa.ipc.new_stream if stream else pa.ipc.new_file
        with pa.OSFile(str(file), "wb") as sink, new(sink, made.schema) as writer:
            writer.write_table(made, max_chunksize=4)
    source = load(tmp_path / "saved")
    assert torch.equal(source.whole_training().x, EXPECTED[:15])
    assert torch.equal(source.test().x, EXPECTED[15:]) and source.test().y.tolist() == LABELS[15:].tolist()


def test_parts_columns_and_names_are_found(tmp_path):
    fine = table(
        slice(0, 12), image="image", label="fine_label", names=None, coarse_label=np.zeros(12, int), id=["x"] * 12
    )
    root = write(tmp_path / "set", train=[fine], validation=[fine])
    source = load("parquet", root)
    assert source.classes == ("0", "1", "2") and source.whole_training().y.tolist() == LABELS[:12].tolist()
    assert torch.equal(source.test().x, EXPECTED[:12])
    unlabelled = fine.set_column(1, "fine_label", pa.array([-1] * 12))
    assert source.test().y.tolist() == load(write(root, test=[unlabelled])).test().y.tolist()
    labelled = fine.set_column(1, "fine_label", pa.array([2] * 12))
    assert load(write(root, test=[labelled])).test().y.tolist() == [2] * 12
    assert load(root / "data" / "train-00000-of-00001.parquet").shape == (3, 6, 5)


def test_mixed_sizes_are_resized_or_named(tmp_path):
    images = [png(PIXELS[0]), png(PIXELS[1, :4]), png(np.zeros((9, 30), np.uint8))]
    mixed = pa.table({"image": images * 2, "label": [0, 1, 0, 1, 0, 1]})
    root = write(tmp_path, train=[mixed])
    assert load(root, resize=4).whole_training().x.shape == (6, 3, 4, 4)
    with pytest.raises(ValueError, match=r"parquet: row 1 cannot be used: it is 5 × 4 .*row 0 is 5 × 6; .*--resize 5"):
        load(root).training()


def test_grey_images_are_one_channel_and_a_grey_one_among_coloured_is_made_rgb(tmp_path):
    grey = [png(p[..., 0]) for p in PIXELS]
    root = write(tmp_path / "grey", train=[pa.table({"image": grey, "label": LABELS})])
    assert torch.equal(load(root).whole_training().x, EXPECTED[:, :1])
    root = write(tmp_path / "both", train=[pa.table({"image": [*grey[:3], png(PIXELS[3])], "label": [0, 1, 0, 1]})])
    assert torch.equal(load(root).whole_training().x[:3], EXPECTED[:3, :1].expand(3, 3, 6, 5))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"text": ["a"], "label": [0]},
            r"has no column of images .*; its columns are: text \(string\), label \(int64\)",
        ),
        ({"image": [b"x"], "caption": ["a"]}, "no column of labels in .* is found"),
        ({"image": [b"x"], "label": ["cat"]}, "column label is string, but labels must be integers"),
        ({"image": [b"x"], "label": [1.0]}, "column label is double, but labels must be integers"),
        ({"image": [b"x", b"y"], "label": [0, None]}, "column label is int64 with 1 missing"),
        ({"image": [b"x"], "label": [0]}, "row 0 is not an image, or is damaged"),
        ({"image": [{"bytes": None, "path": "a.png"}], "label": [0]}, "no column of images|row 0 has no bytes"),
        ({"image": [[[300, 1]]], "label": [0]}, "row 0 has values from 1 to 300"),
        ({"image": [[[1, 2], [3]]], "label": [0]}, "row 0 is no image"),
    ],
)
def test_wrong_columns_are_named(tmp_path, columns, message):
    with pytest.raises(ValueError, match=message) as found:
        load(write(tmp_path, train=[pa.table(columns)]))
    assert "train-00000-of-00001.parquet" in str(found.value)


def test_labels_without_a_class_and_damaged_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"data has the label 2, but there are 2 classes"):
        load(write(tmp_path / "a", train=[table(names=("a", "b"))]))
    root = write(tmp_path / "b", train=[table()])
    file = root / "data" / "train-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"train-00000-of-00001\.parquet cannot be read, .* damaged"):
        load(root)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"holds no \.parquet or \.arrow file"):
        load("parquet", empty)


@pytest.mark.parametrize("hold", [True, False])
def test_a_damaged_image_is_named_by_file_and_row(tmp_path, hold):
    second = table(slice(10, 20))
    content = second["img"].to_pylist()
    content[4]["bytes"] = content[4]["bytes"][:60]
    root = write(tmp_path, train=[table(slice(0, 10)), second.set_column(0, "img", pa.array(content))])
    source = load(root, hold=hold)
    if hold:
        with pytest.raises(
            DamagedImage, match=r"train-00001-of-00002\.parquet: row 4 (cannot be used|is not an image)"
        ):
            source.training()
        return
    with pytest.warns(UserWarning, match="copied once"):
        part = source.whole_training()
    assert torch.equal(part.x[:14], EXPECTED[:14])
    with pytest.raises(DamagedImage, match=r"train-00001-of-00002\.parquet: row 4 (cannot be used|is not an image)"):
        part.x[[14]]


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    root = write(tmp_path, train=[table()])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"pip install 'gsem-torch\[parquet\]'"):
        load(root)
