"""The attack as a graph: what is replayed ends with the bits of plain passes, and is found again only where it fits."""

import inspect
import json
import warnings
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import gsem
from gsem.data import Split
from gsem.nn.folded import FoldedModel, fold
from gsem.nn.gsem import IntegerNoise
from gsem.training import cuda_graph, validation
from gsem.training.attack import attack_from
from gsem.training.cuda_graph import MOST_SHAPES, GraphedAttack, Work
from gsem.training.recipe import Recipe
from gsem.training.step import Average, Stepper
from planted import small_digits
from recorded_graph import RecordedGraph, memory

EPS = 0.1
SMALL = {"steps": 2, "eot": 1, "draws": 1, "awp_warmup": 0.0, "augment": "crop", "model": "gsem-resnet10x16",
         "precision": "float32", "attack_precision": "float32"}  # fmt: skip


@pytest.fixture(autouse=True)
def _short_validation(monkeypatch):
    monkeypatch.setattr(validation, "STEPS", 2)
    monkeypatch.setattr(validation, "DRAWS", 2)


class Made:
    """Makes graphs, and keeps them."""

    def __init__(self) -> None:
        self.graphs: list[RecordedGraph] = []

    def __call__(self) -> RecordedGraph:
        self.graphs.append(RecordedGraph())
        return self.graphs[-1]

    @property
    def replays(self) -> list[int]:
        return [graph.replays for graph in self.graphs]


class Failing(RecordedGraph):
    """Stops in the middle, as where the memory is full."""

    def capture(self, work: Callable) -> None:
        work()
        raise RuntimeError("out of memory\nwith a second line")


def network(name: str = "gsem-resnet10x16") -> nn.Module:
    torch.manual_seed(0)
    return gsem.create_model(name, in_channels=1)


def digits(n: int) -> tuple[Tensor, Tensor]:
    images = gsem.data.load("digits").read_train()
    return images.x[:n], images.y[:n]


def stepper_of(recipe: Recipe, make: Callable | None, few_digits, average: bool = False) -> Stepper:
    model = network(recipe.model)
    averaged = Average(model, network(recipe.model), 0.9, equal=False) if average else None
    stepper = Stepper(recipe, few_digits, EPS, model, averaged)
    assert stepper.graphed is None  # on a CPU, auto is plain
    stepper.graphed = None if make is None else GraphedAttack(make)
    return stepper


def trained(stepper: Stepper) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Weights (of the average, too) after batches of two sizes, and the validations between."""
    x, y = digits(24)
    held_out = Split(*digits(6))
    validate = validation.Validator(stepper, held_out)
    found = []
    for step, rows in enumerate((8, 8, 5, 8, 5)):
        at = slice(step, step + rows)
        averaged = step - 1 if stepper.average and step else None
        stepper(x[at], y[at], step=step, epoch=0.5, averaged=averaged)
        if step in (1, 3):
            found.append(validate(stepper.average.model if stepper.average else stepper.model))
    tensors, _ = stepper.state()
    return {name: t.clone() for name, t in tensors.items()}, found


@pytest.mark.parametrize(
    ("name", "changes", "average"),
    [
        ("gcat", {}, True),
        ("gcat-published", {"eot": 3, "draws": 2}, False),
        ("gcat-awp", {}, False),
        ("trades", {}, False),
        ("gcat-fast", {"steps": 1}, False),
        ("pgd-at", {"norm": "L2", "model": "resnet10x16"}, False),
    ],
)
def test_steps_with_replayed_attacks_end_with_the_bits_of_plain_ones(name, changes, average, few_digits):
    recipe = replace(gsem.RECIPES[name], **SMALL | changes)
    expected = trained(stepper_of(recipe, None, few_digits, average))
    made = Made()
    found = trained(stepper_of(recipe, made, few_digits, average))
    # Batches of 8 (three) and of 5 (two) and each model's validation (two) were captured first, and then replayed.
    assert sorted(made.replays) == [1] * (3 if average else 2) + [2]
    assert found[1] == expected[1]
    assert expected[0].keys() == found[0].keys()
    for key, tensor in expected[0].items():
        assert torch.equal(found[0][key], tensor), key


@pytest.fixture
def task():
    model = network()
    x, y = digits(6)
    x = gsem.data.to_float(x).contiguous(memory_format=torch.channels_last)
    start = (x + 0.05 * torch.rand_like(x)).clamp(0, 1)
    return fold(model), x, y, start


RECIPE = replace(gsem.RECIPES["gcat"], **SMALL)


def both(recipe: Recipe, graphed: GraphedAttack, folded: FoldedModel, *inputs: Tensor) -> None:
    """Graphed and plain give the same, and leave the same random numbers."""
    keys = [m.key for m in folded.modules() if isinstance(m, IntegerNoise)]
    former = [key.clone() for key in keys]
    outcomes = []
    for attack in (graphed, attack_from):
        torch.manual_seed(7)
        for key, value in zip(keys, former, strict=True):
            key.copy_(value)
        found = attack(recipe, folded, *inputs, eps=EPS)
        outcomes.append((*found, torch.rand(1), *(key.clone() for key in keys)))
    for ours, plain in zip(*outcomes, strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("objective", ["ce", "trades"])
def test_other_images_labels_and_starts_are_read_in_every_search_precision(task, precision, objective):
    folded, x, y, start = task
    folded, made = fold(folded.source, precision), Made()
    graphed = GraphedAttack(made)
    recipe = replace(RECIPE, objective=objective, eot=2)
    for shift in range(3):
        both(recipe, graphed, folded, x.roll(shift, 0), y.roll(shift + 1, 0), start.roll(shift, 0))
    assert made.replays == [2]


def test_it_reads_nothing_but_its_inputs_the_model_and_the_folded_model(task):
    folded, x, y, start = task
    made = Made()
    graphed = GraphedAttack(made)
    graphed(replace(RECIPE, objective="trades"), folded, x, y, start, eps=EPS)
    (captured,) = graphed.known.values()
    state = [t for m in (folded.source, folded) for t in (*m.parameters(), *m.buffers())]
    assert made.graphs[0].read <= {memory(t) for t in [*captured.inputs, *state]}
    assert not made.graphs[0].read & {memory(t) for t in (x, y, start)}


def test_what_was_returned_is_not_overwritten_by_the_next_replay(task):
    folded, x, y, start = task
    graphed = GraphedAttack(Made())
    found = [graphed(RECIPE, folded, t, y, start, eps=EPS)[0] for t in (x, x, x.flip(0))]
    assert not torch.equal(found[1], found[2])
    assert len({memory(t) for t in found}) == 3


def test_the_noise_is_fresh_frozen_off_or_seeded_as_set_at_the_replay(task):
    folded, x, y, start = task
    made = Made()
    graphed = GraphedAttack(made)
    modes = [("fresh", None), ("fresh", 1), ("frozen", 2), ("off", None)]
    for seed in range(2):
        for mode, given in modes:
            with gsem.noise(folded.source, mode, seed=None if given is None else given + seed):
                both(RECIPE, graphed, folded, x, y, start)
    assert made.replays == [1, 1, 1, 1]


def moved(model: nn.Module) -> None:
    weight = model.get_parameter("layer1.0.conv1.weight")
    weight.data = 2 * weight.data


def another_buffer(model: nn.Module) -> None:
    model.bn1.running_mean = model.bn1.running_mean + 1


def masked(model: nn.Module) -> None:
    model.gsem_module.gradient = "semi-masked"


def not_trained(model: nn.Module) -> None:
    model.get_parameter("layer1.0.conv1.weight").requires_grad_(False)


@pytest.mark.parametrize("change", [moved, another_buffer, masked, not_trained])
def test_a_model_that_has_changed_is_captured_anew(task, change):
    folded, x, y, start = task
    made = Made()
    graphed = GraphedAttack(made)
    both(RECIPE, graphed, folded, x, y, start)
    change(folded.source)
    for _ in range(2):
        both(RECIPE, graphed, folded, x, y, start)
    assert made.replays == [0, 1]
    with torch.no_grad():  # in place, as an optimizer and load_state_dict write
        for p in folded.source.parameters():
            p.mul_(1.5)
    both(RECIPE, graphed, folded, x, y, start)
    assert made.replays == [0, 2]


def test_another_shape_or_dtype_or_model_is_another_graph_and_there_are_few(task):
    folded, x, y, start = task
    made = Made()
    graphed = GraphedAttack(made)
    both(RECIPE, graphed, folded, x, y, start)
    both(RECIPE, graphed, folded, x, y, start.double())
    both(RECIPE, graphed, fold(folded.source), x, y, start)
    for rows in range(1, 6):
        both(RECIPE, graphed, folded, x[:rows], y[:rows], start[:rows])
    assert len(made.graphs) == MOST_SHAPES
    both(RECIPE, graphed, folded, x[:3, :, :7], y[:3], start[:3, :, :7])
    assert len(made.graphs) == MOST_SHAPES


def test_a_failed_capture_is_one_warning_and_plain_attacks(task):
    folded, x, y, start = task
    graphed = GraphedAttack(Failing)
    with pytest.warns(UserWarning, match=r"without a CUDA graph.*: out of memory$"):
        both(RECIPE, graphed, folded, x, y, start)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both(RECIPE, graphed, folded, x, y, start)
        both(RECIPE, graphed, folded, x[:3], y[:3], start[:3])
    assert not graphed.used


def test_the_first_cause_of_a_failed_capture_is_named(task):
    class Invalidated(RecordedGraph):
        def capture(self, work: Callable) -> None:
            try:
                raise RuntimeError("a value was read")
            finally:
                raise RuntimeError("capture invalidated")

    with pytest.warns(UserWarning, match="a value was read"):
        GraphedAttack(Invalidated)(RECIPE, *task, eps=EPS)


class Counting(nn.Module):
    """Each pass differs from the last by what Python counts; torch.fx cannot trace it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 10))
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1 if x.mean() > -1 else 2
        return x.roll(self.passes, 3).flatten(1) @ self.weight


def test_a_network_whose_forward_runs_in_python_is_not_captured():
    model, made = Counting(), Made()
    with pytest.warns(UserWarning, match="cannot trace"):
        one, other = fold(model), fold(model)
    x, y = torch.rand(4, 1, 8, 8), torch.arange(4)
    graphed = GraphedAttack(made)
    for _ in range(2):
        found, plain = (attack(RECIPE, m, x, y, x, eps=EPS) for attack, m in ((graphed, one), (attack_from, other)))
        assert torch.equal(found[0], plain[0])
    assert not made.graphs


def test_work_is_what_torch_counts_and_views_launch_nothing():
    x, weight = torch.rand(2, 3, 8, 8), torch.rand(4, 3, 3, 3)
    with Work() as work:
        y = torch.conv2d(x, weight)
        y.flatten(1)[:1].add_(1)
        torch.empty(1000)
    assert work.launches == 2
    assert work.flops == 2 * 2 * 4 * 6 * 6 * 27
    assert work.bytes == 4 * (x.numel() + weight.numel() + y.numel()) + 4 * 2 * y[:1].numel()
    assert work.launch_seconds == pytest.approx(1e-5)
    assert work.device_seconds == pytest.approx(work.flops / 400e12 + work.bytes / 3e12)


@pytest.mark.parametrize(
    ("name", "rows", "pays"), [("resnet18", 256, False), ("resnet18", 64, True), ("gsem-resnet10x16", 128, True)]
)
def test_small_attacks_wait_for_launches_and_large_ones_do_not(name, rows, pays):
    # On torch's meta device, which computes shapes only.
    folded = fold(gsem.create_model(name).to("meta"), torch.bfloat16)
    x, y = torch.empty(rows, 3, 32, 32, device="meta"), torch.zeros(rows, dtype=torch.int64, device="meta")
    with Work() as work:
        attack_from(replace(RECIPE, steps=10), folded, x, y, x, eps=EPS)
    assert work.waits_for_launches == pays


def test_an_attack_that_does_not_pay_stays_plain(task, monkeypatch):
    monkeypatch.setattr(cuda_graph, "LAUNCH_SECONDS", 0.0)
    made = Made()
    graphed = GraphedAttack(made)
    for _ in range(2):
        both(RECIPE, graphed, *task)
    assert not made.graphs and not graphed.used


class FakeCuda:
    """In the place of torch.cuda: writes down what is asked of it. The capture itself fails where `stops` is set."""

    def __init__(self, monkeypatch, stops: bool = False):
        self.log: list[str] = []
        self.stops = stops
        self.generator = mock.Mock()
        self.graph = mock.Mock(replay=lambda: self.log.append("replay"))
        self.own, self.usual = self.stream("own"), self.stream("usual")
        # What a capture is asked for is checked against the real one.
        self.arguments = inspect.signature(torch.cuda.graph)
        for name, fake in {
            "device": lambda device: nullcontext(),
            "stream": lambda stream: self.block("own stream"),
            "current_stream": lambda: self.usual,
            "current_device": lambda: 0,
            "CUDAGraph": lambda: self.graph,
            "graph": self.captured,
            "default_generators": (self.generator,),
        }.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def stream(self, name: str) -> mock.Mock:
        return mock.Mock(wait_stream=lambda other: self.log.append(f"{name} waits"))

    @contextmanager
    def block(self, name: str):
        self.log.append(name)
        try:
            yield
        finally:
            self.log.append(f"end of {name}")

    @contextmanager
    def captured(self, *args, **kwargs):
        given = self.arguments.bind(*args, **kwargs).arguments
        assert given["cuda_graph"] is self.graph and given["stream"] is self.own and given["pool"] == (0, 1)
        with self.block("capture"):
            yield
        if self.stops:
            raise RuntimeError("capture invalidated")


@pytest.mark.parametrize("stops", [False, True])
def test_a_cuda_graph_is_captured_on_its_own_stream_after_warm_ups(monkeypatch, stops):
    cuda = FakeCuda(monkeypatch, stops)
    graph = cuda_graph.CudaGraph(cuda.own, (0, 1))

    def work() -> int:
        cuda.log.append("work")
        return 3

    expected = ["own waits", "own stream", "work", "work", "work", "capture", "work", "end of capture"]
    expected.append("end of own stream")
    if stops:
        with pytest.raises(RuntimeError, match="invalidated"):
            graph.capture(work)
        assert cuda.log == expected
    else:
        assert graph.capture(work) == 3
        graph.replay()
        assert cuda.log == [*expected, "usual waits", "replay"]
    # A generator that a failed capture has left half captured would refuse to draw.
    replaced = [mock.call(cuda.generator.clone_state.return_value)] if stops else []
    assert cuda.generator.graphsafe_set_state.mock_calls == replaced


# --- gsem.train ---------------------------------------------------------------------------------------------------

TRAINING = replace(RECIPE, epochs=2, steps=1, batch_size=8, steps_per_epoch=3, warmup=0.0, milestones=())


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> gsem.Run:
    out = tmp_path_factory.mktemp("runs") / "plain"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "STEPS", 2)
        patch.setattr(validation, "DRAWS", 2)
        return gsem.train(TRAINING, data=small_digits(), out=out, device="cpu", compile="off")


def recorded(run: gsem.Run) -> dict[str, str]:
    return json.loads((run.path / "recipe.json").read_text())["compile"]


def test_on_a_cpu_auto_is_plain_and_recorded_so(plain, few_digits, tmp_path):
    run = gsem.train(TRAINING, data=few_digits, out=tmp_path / "run", device="cpu")
    assert recorded(run) == {"asked": "auto", "used": "off"}
    assert recorded(plain) == {"asked": "off", "used": "off"}
    assert same_weights(run, plain)


def same_weights(one: gsem.Run, other: gsem.Run) -> bool:
    weights = other.model().state_dict()
    return all(torch.equal(weight, weights[name]) for name, weight in one.model().state_dict().items())


def test_a_run_with_graphs_records_them_and_has_the_same_weights(plain, few_digits, tmp_path, monkeypatch):
    made = Made()
    monkeypatch.setattr("gsem.training.step.graphed_attack", lambda device: GraphedAttack(made))
    run = gsem.train(TRAINING, data=few_digits, out=tmp_path / "graphs", device="cpu")
    assert sum(made.replays) >= 4
    assert recorded(run) == {"asked": "auto", "used": "CUDA graph"}
    assert same_weights(run, plain)


def test_where_torch_compile_fails_passes_are_plain(plain, few_digits, tmp_path, monkeypatch):
    def fails(graph, inputs):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=fails))
    with pytest.warns(UserWarning, match=r"without torch\.compile.*no C\+\+ compiler"):
        run = gsem.train(TRAINING, data=few_digits, out=tmp_path / "run", device="cpu", compile="on")
    assert recorded(run) == {"asked": "on", "used": "off"}
    assert same_weights(run, plain)


@pytest.mark.parametrize("wrong", ["fast", True])
def test_another_word_is_refused(wrong, tmp_path):
    with pytest.raises(ValueError, match="it is auto, on or off"):
        gsem.train(TRAINING, out=tmp_path / "run", compile=wrong)
    assert not (tmp_path / "run").exists()
