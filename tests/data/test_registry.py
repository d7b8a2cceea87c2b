import numpy as np
import pytest

from gsem.data import DATASETS, load


def test_every_source_has_one_line():
    assert {"digits", "folder", "npz"} <= set(DATASETS)
    assert all(line and "\n" not in line for line in DATASETS.values())


def test_an_unknown_name_is_named_with_near_ones():
    with pytest.raises(ValueError, match=r"'Digit' is unknown. Did you mean digits\? Possible are: digits, folder"):
        load("Digit")
    with pytest.raises(ValueError, match=r"'qqq' is unknown\. Possible are"):
        load("qqq")


def test_paths_that_are_not_there(tmp_path):
    for name in (tmp_path / "none.npz", tmp_path / "none", "none.npz"):
        with pytest.raises(FileNotFoundError, match="there is no file"):
            load(str(name))
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        load("folder", root=tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load("npz", root=tmp_path / "none.npz")


def test_root_is_needed_by_some_names_and_belongs_to_names(tmp_path):
    for name in ("folder", "npz"):
        with pytest.raises(ValueError, match=f"'{name}' needs root"):
            load(name)
    with pytest.raises(ValueError, match="root goes with a name"):
        load(str(tmp_path), root=tmp_path)
    assert load("digits", root=tmp_path).name == "digits"


def test_a_file_of_another_kind_is_named(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"x\.npy is neither a directory nor an \.npz, parquet or arrow file"):
        load(str(tmp_path / "x.npy"))
