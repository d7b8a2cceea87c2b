"""A verdict is shown over the accuracies of its own network only, and files that are left out are named."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import gsem
from gsem.cli.main import main
from gsem.reporting import cards, html, markdown, read_runs
from planted_run import planted_audit, planted_fingerprint, planted_result, planted_run

FACTORY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, sharpness):
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor(sharpness))
    def forward(self, x):
        left, right = x[..., :4].mean((1, 2, 3)), x[..., 4:].mean((1, 2, 3))
        return self.sharpness * torch.stack([left, right], 1)

def one():
    return Net(1.0)

def other():
    return Net(2.0)
"""


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(FACTORY)
    monkeypatch.delitem(__import__("sys").modules, "nets", raising=False)
    y = np.arange(24) % 2
    x = np.random.default_rng(0).integers(0, 100, (24, 8, 8, 1)).astype(np.uint8)
    np.savez(tmp_path / "images.npz", x_test=x, y_test=y)
    return tmp_path


def run(*words) -> None:
    assert main([str(word) for word in words]) == 0


def audited(model: str, *words) -> None:
    run("audit", model, "--data", "images.npz", "--only", "randomness", "--attacks", "pgd:steps=1", *words)


def reported(*words) -> tuple[str, dict]:
    run("report", *words, "-o", "page.html", "--markdown", "page.md", "--json", "card.json", "--images", 0)
    return Path("page.html").read_text(), json.loads(Path("card.json").read_text())


def test_the_audit_of_another_network_is_not_the_verdict_on_this_one(here):
    run("evaluate", "nets:one", "--data", "images.npz", "--attacks", "clean")
    audited("nets:other")
    page, card = reported("evaluation.npz")
    left_out = "audit.json: it is of other weights (nets:other)"
    for text in (page, Path("page.md").read_text()):
        assert f"Not shown: {left_out}." in text
    assert "NOT AUDITED" in page and "No audit here belongs to these accuracies" in page
    assert "<h1>nets:one</h1>" in page and card["name"] == card["architecture"] == "nets:one"
    assert card["unreliable"] is None and card["gsem"]["not_used"] == [left_out] and left_out in card["footnote"]
    assert card["dataset"] == "images.npz"
    assert "`gsem audit nets:one --data images.npz --eps 8/255`" in Path("page.md").read_text()
    audited("nets:one")
    page, card = reported("evaluation.npz")
    assert card["gsem"]["verdict"] == "INCOMPLETE" and "NOT AUDITED" not in page and f"Not shown: {left_out}." in page


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--eps", "0.3"), "it was made at eps = 0.3 (Linf), the evaluation at eps = 8/255 (Linf)"),
        (("--norm", "L2", "--eps", "8/255"), "it was made at eps = 8/255 (L2), the evaluation at eps = 8/255 (Linf)"),
        (("--data", "others.npz"), "it was made on other data (others.npz)"),
    ],
)
def test_the_audit_of_another_question_is_not_the_verdict_on_this_one(here, words, reason):
    with np.load("images.npz") as file:
        np.savez("others.npz", x_test=file["x_test"] + 1, y_test=file["y_test"])
    run("evaluate", "nets:one", "--data", "images.npz", "--attacks", "clean")
    audited("nets:one", *words)
    page, _ = reported("evaluation.npz")
    assert "NOT AUDITED" in page and f"Not shown: audit.json: {reason}." in page
    audited("nets:one", "--images", "8")  # other images of the same data set
    assert "NOT AUDITED" not in reported("evaluation.npz")[0]


def test_an_audit_is_not_overwritten_by_another(here, capsys):
    audited("nets:one", "--out", "a.json")
    before = Path("a.json").read_bytes()
    audited("nets:one", "--out", "a.json")  # the same once more
    for words, different in (
        (("nets:other",), "the model's weights."),
        (("nets:one", "--eps", "0.3"), "eps (8/255 then, 0.3 now)"),
        (("nets:one", "--images", "8"), "the images"),
    ):
        with pytest.raises(AssertionError):
            audited(*words, "--out", "a.json")
        assert f"a.json is there already, and is a different audit. It differs in: {different}" in (
            capsys.readouterr().err
        )
    Path("notes.json").write_text("{}")
    with pytest.raises(AssertionError):
        audited("nets:one", "--out", "notes.json")
    assert "notes.json is there already, and is no audit" in capsys.readouterr().err
    metadata = json.loads(before)["metadata"], json.loads(Path("a.json").read_bytes())["metadata"]
    assert metadata[0]["fingerprint"] == metadata[1]["fingerprint"] and Path("notes.json").read_text() == "{}"


def test_a_run_its_evaluation_and_its_audit_are_of_one_network(here, few_digits):
    """With averaged weights, as `best` has them, and a GSeM."""
    recipe = gsem.Recipe(steps=1, epochs=1, batch_size=64, ema=0.9, eps=0.05)
    gsem.train(recipe, out="r", data=few_digits, device="cpu")
    common = ("--data", "digits", "--images", 10, "--draws", 5)
    run("evaluate", "r", *common, "--attacks", "clean", "--no-frozen")
    run("audit", "r", *common, "--only", "randomness", "--attacks", "pgd:steps=1")
    entry = read_runs(["r"])[0]
    assert entry.audit is not None and entry.result is not None and entry.unmatched == ()
    # An audit of another gradient does not apply to the evaluation.
    run("audit", "r", *common, "--only", "randomness", "--attacks", "pgd:steps=1", "--gradient", "semi-masked")
    entry = read_runs(["r"])[0]
    assert "semi-masked" not in entry.audit.metadata["command"]
    [left_out] = entry.unmatched
    assert left_out == "audit-2.json: it is of the same weights in another network, or with another setting (r)"
    # The checkpoint was replaced: the measurements are of another network now.
    gsem.train(replace(recipe, seed=1), out="s", data=few_digits, device="cpu")
    Path("s/checkpoints/best.safetensors").replace("r/checkpoints/best.safetensors")
    entry = read_runs(["r"])[0]
    assert entry.result is None and entry.audit is None
    assert entry.unmatched[0] == "evaluation.npz: it is of other weights (r)"
    assert "No evaluation was made" in markdown([entry])


def test_an_evaluation_of_another_network_in_a_run_directory(tmp_path):
    path = planted_run(tmp_path / "run", weights=True)
    assert read_runs([path])[0].unmatched == ()
    other = {"structure": "0", "weights": "1"}
    result = planted_result()
    about = result.metadata["about"] | {"model": "mine:net"}
    replace(result, metadata=result.metadata | {"fingerprint": other, "about": about}).save(path / "evaluation-2")
    entry = read_runs([path])[0]
    assert entry.file == "evaluation.npz" and entry.others == ()
    assert entry.unmatched == ("evaluation-2.npz: it is of another network (mine:net)",)
    assert entry.audit.verdict == "OVERSTATED"
    # Named by its file, it is shown alone.
    entry = read_runs([path / "evaluation-2.npz"])[0]
    assert (entry.name, entry.metadata, entry.metrics, entry.audit) == ("mine:net", {}, (), None)
    run_left_out, audit_left_out = entry.unmatched
    assert run_left_out.startswith("recipe.json, metrics.jsonl: evaluation-2.npz is not of this run (it is of another")
    assert audit_left_out == "audit.json: it is of another network"
    assert "There is no recipe" in html([entry])


def test_commands_of_a_page_quote_paths_with_spaces(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = planted_run(Path("my run"), audit=False)
    text = markdown(read_runs([path]))
    assert "`gsem audit 'my run'`" in text
    (path / "evaluation.npz").rename(path / "evaluation-2.npz")
    (path / "evaluation-3.npz").write_bytes((path / "evaluation-2.npz").read_bytes())
    words = html(read_runs([path])).replace('</span> <span class="whole">', " ")
    assert "gsem report &#39;my run/evaluation-2.npz&#39;" in words
    for file in path.glob("evaluation*"):
        file.unlink()
    assert "`gsem evaluate 'my run' --suite standard`" in markdown(read_runs([path]))


def test_files_that_do_not_record_their_network_are_not_joined(tmp_path):
    path = planted_run(tmp_path / "run", weights=True)
    metadata = {k: v for k, v in planted_audit().metadata.items() if k != "fingerprint"}
    planted_audit(metadata=metadata).save(path / "audit.json")
    assert read_runs([path])[0].unmatched[0].startswith("audit.json: it does not record its network")
    metadata = {k: v for k, v in planted_result().metadata.items() if k != "fingerprint"}
    replace(planted_result(), metadata=metadata).save(path / "evaluation")
    entry = read_runs([path])[0]
    assert entry.result is None and entry.unmatched[0].startswith("evaluation.npz: it does not record")
    planted_audit().save(path / "audit.json")
    entry = read_runs([path / "evaluation.npz"])[0]
    assert entry.audit is None and "earlier version" in entry.unmatched[-1]


def test_a_run_whose_checkpoints_cannot_be_read(tmp_path):
    path = planted_run(tmp_path / "run", weights=True)
    (path / "checkpoints/best.safetensors").write_bytes(b"damaged")
    entry = read_runs([path])[0]
    assert entry.result is not None and entry.audit is not None
    assert entry.unmatched[0].startswith("checkpoints: they cannot be read")


def test_a_checkpoint_without_a_fingerprint_is_known_by_its_weights(tmp_path):
    path = planted_run(tmp_path / "run", weights=True)
    assert gsem.training.run.run_fingerprint(path) == planted_fingerprint()
    assert json.loads(cards(read_runs([path])))["gsem"]["not_used"] == []
