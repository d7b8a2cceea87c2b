"""Which precision a recipe runs in, by the rule and on faked processors; and which devices are accepted."""

import json
import warnings
from dataclasses import replace

import pytest
import torch

import gsem
from gsem import _env as device
from gsem._env import choose_precision, cpu_multiplies_bf16, device_named, require_float64
from gsem._io import read_checkpoint
from gsem.reporting.visuals import pictures
from gsem.training.step import Stepper
from gsem.training.trainer import train
from killed_training import RECIPE
from planted import halves, small_net

CPU, CUDA, MPS = (torch.device(kind) for kind in ("cpu", "cuda", "mps"))
TINY = replace(RECIPE, rounds=1, epochs=2, validate_every=2)


@pytest.fixture
def processor(monkeypatch):
    """Sets what the processor multiplies in hardware."""

    def fake(*, amx: bool = False, avx512_bf16: bool = False, arm_bf16: bool | None = None) -> None:
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
        monkeypatch.setattr(device.platform, "machine", lambda: "x86_64" if arm_bf16 is None else "aarch64")
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
        monkeypatch.setattr(device, "arm_multiplies_bf16", lambda: bool(arm_bf16))

    return fake


@pytest.mark.parametrize(
    ("abilities", "chosen"),
    [
        ({}, "float32"),
        ({"amx": True}, "bf16"),
        ({"avx512_bf16": True}, "bf16"),
        ({"arm_bf16": True}, "bf16"),
        ({"arm_bf16": False}, "float32"),
        ({"arm_bf16": False, "amx": True}, "float32"),
    ],
)
def test_auto_is_bf16_where_the_processor_multiplies_it(processor, abilities, chosen):
    processor(**abilities)
    assert cpu_multiplies_bf16() == (chosen == "bf16")
    assert choose_precision("auto", CPU) == choose_precision("fp16", CPU) == chosen
    assert choose_precision("bf16", CPU) == "bf16"
    assert choose_precision("float32", CPU) == "float32"


@pytest.mark.parametrize(
    ("limit", "allowed"), [("AVX2", False), ("avx512_core_vnni", False), ("AVX512_CORE_AMX", True)]
)
def test_instructions_that_onednn_may_not_use_do_not_count(processor, monkeypatch, limit, allowed):
    processor(amx=True, avx512_bf16=True)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert cpu_multiplies_bf16() == allowed


@pytest.mark.parametrize(("capability", "chosen"), [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_auto_on_a_gpu_follows_its_compute_capability(monkeypatch, capability, chosen):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda where: capability)
    assert choose_precision("auto", CUDA) == chosen
    assert choose_precision("fp16", CUDA) == "fp16"


def test_mps_is_float32_and_refuses_the_rest_by_name():
    assert choose_precision("auto", MPS) == choose_precision("float32", MPS) == "float32"
    with pytest.raises(ValueError, match="bf16 is not supported on mps"):
        choose_precision("bf16", MPS)
    with pytest.raises(ValueError, match="augment autoaugment computes in float64"):
        require_float64(MPS, "augment autoaugment")
    require_float64(CPU, "augment autoaugment")


def test_every_recipe_asks_for_auto_but_the_published_ones_train_in_fp16():
    for name, recipe in gsem.RECIPES.items():
        assert recipe.attack_precision == "auto"
        assert recipe.precision == ("fp16" if name.endswith("-published") else "auto")


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_named("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match=r"'cuda:2'.*cuda:0 to cuda:1"):
        device_named("cuda:2")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no Apple GPU"):
        device_named("mps")
    for name in ("meta", "tpu"):
        with pytest.raises(ValueError, match=f"{name}.* cpu, cuda, cuda:N or mps"):
            device_named(name)


@pytest.mark.parametrize("hardware", [True, False])
def test_the_precision_that_a_run_chose_is_recorded_and_kept_on_the_other_kind(
    tmp_path, few_digits, processor, hardware
):
    """Stopped after an epoch and resumed where `auto` means another precision, the run ends with the same bits."""
    used = "bf16" if hardware else "float32"
    seen = []

    def stop_after_one(p) -> None:
        seen.append(p.precision)
        if p.epoch == 1 and p.epoch_ended and not (tmp_path / "whole").exists():
            raise InterruptedError

    processor(amx=hardware)
    with pytest.raises(InterruptedError):
        train(TINY, data=few_digits, out=tmp_path / "stopped", device="cpu", on_progress=stop_after_one)
    whole = train(TINY, data=few_digits, out=tmp_path / "whole", device="cpu", on_progress=lambda p: None)
    processor(amx=not hardware)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed = train(
            TINY, data=few_digits, out=tmp_path / "stopped", device="cpu", resume=True, on_progress=stop_after_one
        )
    assert {tuple(p.items()) for p in seen} == {(("precision", used), ("attack_precision", used))}
    choice = {"asked": "auto", "used": used}
    for run in (whole, resumed):
        assert json.loads((run.path / "recipe.json").read_text())["precision"] == {
            "precision": choice,
            "attack_precision": choice,
        }
    one, other = (read_checkpoint(run.path / "checkpoints/last.safetensors")[0] for run in (whole, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)
    # A run in bf16 that is resumed where it is emulated warns.
    assert sum("no bf16 instructions" in str(w.message) for w in caught) == hardware


def test_bf16_on_a_processor_that_emulates_it_is_warned_of_once(tmp_path, few_digits, processor):
    processor()
    recipe = replace(TINY, precision="bf16", attack_precision="bf16", epochs=1, validate_every=1, warmup=0.0)
    with pytest.warns(UserWarning, match="5 to 22 times as long") as caught:
        train(recipe, data=few_digits, out=tmp_path / "run", device="cpu")
    assert len(caught) == 1


def test_a_run_in_fp16_is_not_resumed_on_a_cpu(tmp_path, few_digits):
    run = train(
        replace(TINY, epochs=1, validate_every=1, warmup=0.0), data=few_digits, out=tmp_path / "run", device="cpu"
    )
    file = run.path / "recipe.json"
    metadata = json.loads(file.read_text())
    metadata["precision"]["precision"]["used"] = "fp16"
    file.write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match=r"started in fp16.*resume it on a GPU"):
        train(run.recipe, data=few_digits, out=run.path, device="cpu", resume=True)


def test_the_published_recipe_on_a_cpu_follows_the_rule(few_digits, processor):
    for hardware in (True, False):
        processor(amx=hardware)
        model = gsem.create_model("gsem-resnet10x16", in_channels=1)
        stepper = Stepper(replace(TINY, precision="fp16"), few_digits, 0.1, model, None)
        assert stepper.dtype == (torch.bfloat16 if hardware else torch.float32)
        assert not stepper.scaler.is_enabled()


def test_what_computes_in_float64_asks_for_it_before_it_begins(monkeypatch):
    """mps has no float64. (No tensor can be put there on another machine: the device is asked for, and refused.)"""

    def on_mps(device: torch.device, what: str) -> None:
        require_float64(MPS, what)

    model, (x, y) = small_net(), halves(4)
    result = gsem.evaluate(model, x, y, "clean", eps=0.1, save_adv=True)
    for module in ("gsem.auditing.audit", "gsem.evaluation.verify", "gsem.reporting.visuals"):
        monkeypatch.setattr(f"{module}.require_float64", on_mps)
    for what, run in (
        ("an audit", lambda: gsem.audit(model, x, y, eps=0.1, quick=True)),
        ("verify", lambda: gsem.verify(result, model, x, y)),
        ("a report with pictures", lambda: pictures(model, x, y, eps=0.1)),
    ):
        with pytest.raises(ValueError, match=f"{what} computes in float64, which mps does not have"):
            run()


def test_images_that_do_not_fit_on_a_gpu_are_refused_before_they_are_put_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**33))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2**29)
    fits = torch.empty(3, 2**29, dtype=torch.uint8, device="meta")  # 1.5 GiB, of 1 free and 0.5 reserved but not used
    device.require_room(fits, CUDA, "")
    with pytest.raises(ValueError, match=r"4 images take 2\.0 GiB, and cuda:1 has 1\.5 GiB free: stream them"):
        device.require_room(torch.empty(4, 2**29, dtype=torch.uint8, device="meta"), "cuda:1", "stream them")
    device.require_room(torch.empty(4, 2**40, device="meta"), CPU, "")
    part = gsem.data.Split(torch.empty(2, 3, 2**14, 2**14, dtype=torch.uint8, device="meta"), torch.zeros(2).long())
    with pytest.raises(ValueError, match=r"4 images take 3\.0 GiB.*--no-hold"):  # real and additional images
        gsem.data.batches.batches_of([part, part], CUDA)
