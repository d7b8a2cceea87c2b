"""Classes, confusion, gallery and loss surface, against closed forms."""

import base64
import io
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import gsem
from gsem._env import commit
from gsem.reporting import html, read_runs
from gsem.reporting.charts import class_figure, confusion_figure, per_class, surface_figures
from gsem.reporting.report import report
from gsem.reporting.visuals import GRID, REACH, confusion, first_of_each, gallery, gallery_choice, pictures, png
from planted import Flipper, Halves, halves
from planted_run import ATTACKED, CLASSES, planted_result, planted_run

EPS = 0.1


@pytest.fixture
def of_halves():
    x, y = halves(12, contrast=0.15)
    return pictures(Halves().eval(), x, y, eps=EPS)


def test_the_accuracy_of_each_class_is_that_planted():
    found = per_class(planted_result(), ATTACKED)
    assert {label: (round(one.mean, 9), n) for label, (one, n) in found.items()} == {k: (k / 10, 4) for k in range(10)}


def test_the_figure_of_classes_holds_them(tmp_path):
    figure = class_figure(read_runs([planted_run(tmp_path / "run")])[0], 0)
    assert figure.data.header == ("class", "images", "worst", "low", "high", "clean")
    assert [row[:3] for row in figure.data.rows] == [(name, 4, k / 10) for k, name in enumerate(CLASSES)]
    assert {row[5] for row in figure.data.rows} == {0.95}
    assert "lowest zero with 0.0%, highest nine with 90.0%" in str(figure.chart)


def test_confusion_is_counted_in_shares_of_draws():
    y = torch.tensor([0, 0, 1, 2])
    found = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 0]])  # two draws
    expected = [[0.5, 1.5, 0], [0, 1, 0], [1, 0, 0]]
    assert np.array_equal(confusion(found, y, 3), np.array(expected))


@pytest.mark.filterwarnings("ignore:fold runs")
def test_confusion_of_a_flipper_is_its_share():
    x, y = halves(600)
    found = pictures(Flipper(0.3).eval(), x, y, eps=1e-4)
    shares = found.confusion[:2, :2] / found.confusion[:2].sum(1, keepdims=True)
    assert found.draws == 20
    assert np.abs(shares - [[0.7, 0.3], [0.3, 0.7]]).max() < 0.03
    assert found.confusion.sum() == pytest.approx(600)


def test_of_many_classes_the_most_frequent_errors_are_shown(tmp_path, of_halves):
    matrix = np.eye(30)
    matrix[3, 7] = 2.0
    entry = read_runs([planted_run(tmp_path / "run", classes=tuple(f"c{k}" for k in range(30)))])[0]
    figure = confusion_figure(replace(entry, pictures=replace(of_halves, confusion=matrix)), 0)
    assert "c3 → c7" in str(figure.chart)
    assert ("c3", "c7", 2.0, 0.6667) in figure.data.rows
    assert "c3 is taken for c7 in 66.7%" in str(figure.chart)


def test_the_attack_of_the_pictures_breaks_what_can_be_broken(of_halves):
    # A contrast of 0.15 is undone by two halves that move by 0.1 each.
    assert np.array_equal(of_halves.confusion[:2, :2], [[0, 6], [6, 0]])
    for s in of_halves.gallery:
        assert np.abs(s.x_adv - s.x).max() <= EPS + 1e-6
        assert (s.clean, s.clean_right, s.attacked, s.attacked_right) == (s.label, 1, 1 - s.label, 0)


def test_the_surface_is_the_margin_on_the_plane(of_halves):
    for s in of_halves.surfaces:
        shown = of_halves.gallery[s.number]
        assert len(s.along) == GRID
        assert (s.along[0], s.along[-1]) == (-REACH, REACH)
        middle, end = GRID // 2, int(np.abs(s.along - 1).argmin())
        logits = Halves()(torch.from_numpy(np.stack([shown.x, shown.x_adv])))[:, :2].numpy()
        margins = logits[:, 1 - shown.label] - logits[:, shown.label]
        assert s.margin[middle, middle] == pytest.approx(margins[0], abs=1e-5)
        one = s.margin[middle, middle] + s.along[end] * (margins[1] - margins[0])
        assert s.margin[middle, end] == pytest.approx(one, abs=1e-5)
        # The model is linear, and nothing reaches the ends of [0, 1]: so is the surface.
        assert np.abs(np.diff(s.margin, n=2, axis=0)).max() < 1e-5
        assert np.abs(np.diff(s.margin, n=2, axis=1)).max() < 1e-5


@pytest.mark.filterwarnings("ignore:fold runs")
def test_the_callers_random_state_is_left_alone():
    x, y = halves(8)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = pictures(Flipper(0.3).eval(), x, y, eps=EPS)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert np.array_equal(pictures(Flipper(0.3).eval(), x, y, eps=EPS).confusion, first.confusion)
    with pytest.raises(ValueError, match="no images"):
        pictures(Halves().eval(), x[:0], y[:0], eps=EPS)


def test_one_of_each_class_is_shown_those_that_are_right_first():
    y = torch.tensor([1, 1, 0, 2, 2, 0])
    right = torch.tensor([False, True, True, False, False, True])
    assert first_of_each(y, 4, right) == [2, 1, 5, 0]
    assert first_of_each(y, 9, right) == [2, 1, 5, 0, 3, 4]  # (the wrong ones in the same order)


def test_the_caption_holds_how_many_images_are_right_without_an_attack(tmp_path):
    run = planted_run(tmp_path / "run")
    (entry,) = read_runs([run])
    x, y = halves(12, contrast=0.15)
    all_right = pictures(Halves().eval(), x, y, eps=EPS)
    assert gallery_choice(all_right) == "Images that are right without an attack, class by class."
    wrong = y.clone()
    wrong[:8] = 1 - y[:8]
    found = replace(entry, pictures=pictures(Halves().eval(), x, wrong, eps=EPS, rows=np.arange(12) + 400))
    assert sum(shown.clean_right == 1 for shown in found.pictures.gallery) == 4
    assert [shown.clean_right for shown in found.pictures.gallery[:4]] == [1] * 4
    assert "only 4 of these 10" in gallery_choice(found.pictures) and "among 12" in gallery_choice(found.pictures)
    assert gallery_choice(found.pictures) in " ".join(html([found]).split())


def test_images_are_numbered_by_their_rows_in_the_data_set(tmp_path):
    (entry,) = read_runs([planted_run(tmp_path / "run")])
    x, y = halves(12, contrast=0.15)
    found = replace(entry, pictures=pictures(Halves().eval(), x, y, eps=EPS, rows=np.arange(12) * 3 + 400))
    assert [image.number for image in gallery(found.pictures, str)[:4]] == ["Row 400", "Row 403", "Row 406", "Row 409"]
    assert surface_figures(found, 0)[1].title == "Around row 403: one"
    page = html([found])
    assert "Row 403: <b>one</b>" in page and "Image 2" not in page
    unknown = replace(entry, pictures=pictures(Halves().eval(), x, y, eps=EPS))
    assert "Image 2: <b>one</b>" in html([unknown])


def test_a_surface_is_drawn_as_images_of_its_margin(tmp_path, of_halves):
    entry = replace(read_runs([planted_run(tmp_path / "run")])[0], pictures=of_halves)
    margin = of_halves.surfaces[0].margin
    figure = surface_figures(entry, 0)[0]
    chart = str(figure.chart)
    assert chart.count("<rect") == 2 and chart.count("<image") == 2
    right, wrong = (pixels_of(uri) / 255 for uri in re.findall(r'href="(data:[^"]+)"', chart))
    strength = (0.1 + 0.9 * np.abs(margin) / np.abs(margin).max())[::-1]  # the first row of an image is its top
    assert np.abs(wrong - np.where(margin[::-1] > 0, strength, 0)).max() < 0.003
    assert np.abs(right - np.where(margin[::-1] > 0, 0, strength)).max() < 0.003
    assert f"{margin[GRID // 2, GRID // 2]:.2f} at the image" in chart  # the text alternative
    assert len(figure.data.rows) == GRID**2


def pixels_of(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))))


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_png_of_the_same_pixels(channels):
    pixels = np.random.default_rng(0).integers(0, 256, (channels, 5, 4))
    image = pixels_of(png(pixels / 255))
    assert np.array_equal(image if channels == 1 else image.transpose(2, 0, 1), pixels[0] if channels == 1 else pixels)


def test_the_gallery_shows_saved_points(tmp_path, of_halves):
    entry = replace(read_runs([planted_run(tmp_path / "run")])[0], pictures=of_halves)
    shown = gallery(of_halves, entry.class_name)
    assert [e.label for e in shown[:2]] == ["zero", "one"]
    assert (shown[0].before, shown[0].after, shown[0].broken) == ("right", "taken for one", True)
    assert all(f.data.rows and "Around image" in f.title for f in surface_figures(entry, 0))
    assert html([entry]).count("<img") == 3 * len(shown)


def test_a_point_that_is_the_image_itself_is_named(of_halves):
    first = of_halves.gallery[0]
    stands = replace(first, x_adv=first.x, attacked=first.label, attacked_right=1.0)
    wrong = replace(first, x_adv=first.x, clean=1, clean_right=0.0, attacked=1, attacked_right=0.0)
    found = gallery(replace(of_halves, gallery=(stands, wrong, first)), str)
    assert [shown.after for shown in found] == [
        "right; the attack found no point closer to an error than the image",
        "taken for 1; wrong already",
        "taken for 1",
    ]


def test_a_report_computes_its_pictures_from_the_run(tmp_path):
    run = planted_run(tmp_path / "run", weights=True)
    assert report(run, tmp_path / "page.html", images=20) == [tmp_path / "page.html"]
    page = (tmp_path / "page.html").read_text()
    assert "points found for this report by apgd20-eot5" in page
    assert page.count("Around row") >= 3
    report(run, tmp_path / "none.html", images=0)
    assert "switched off by --images 0" in (tmp_path / "none.html").read_text()


def test_a_report_takes_the_points_that_were_saved(tmp_path):
    run = planted_run(tmp_path / "run", weights=True)
    test = gsem.data.load("digits").test()
    x = gsem.data.to_float(test.x[:40]).numpy()
    x_adv = np.clip(x + 0.1, 0, 1).astype(np.float32)
    planted_result(x, x_adv).save(run / "evaluation")
    with np.load(run / "evaluation.npz") as file:  # (points of the unbounded attack are not needed)
        assert file[f"{ATTACKED}.x_adv"].shape == (40, 1, 8, 8)
    report(run, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert f"each image's worst point of the evaluation's attacks ({ATTACKED})" in page.replace("&#39;", "'")
    assert png(x_adv[0]) in page or png(x_adv[10]) in page


def test_without_the_images_they_are_named_as_missing(tmp_path):
    run = planted_run(tmp_path / "run", weights=True, data="gone.npz")
    (run / "evaluation.npz").unlink()
    report(run, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "The test images were not found" in page
    assert "--save-adv" in page


def test_a_commit_is_that_of_the_folders_own_repository(tmp_path):
    assert commit(tmp_path) is None
