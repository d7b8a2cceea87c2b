import itertools

import pytest
import torch

from gsem.rng import derive_seed, generator, seeded

CPU = torch.device("cpu")


def test_split_is_a_function_of_seed_and_names():
    assert derive_seed(3, "search", 7) == derive_seed(3, "search", 7)
    # Runs are reproduced across machines and versions, so the numbers themselves are fixed.
    assert derive_seed(0, "scoring") == 3391383871188124367


def test_streams_are_all_different_and_fit_torch():
    names = [(), ("search",), ("selection",), ("scoring",), ("search", 0), ("search", 1), ("search", "pgd", 10)]
    seeds = [derive_seed(seed, *n) for seed, n in itertools.product([-1, 0, 1, 2, 10, 2**63], names)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_generators_of_two_names_are_uncorrelated_and_private():
    before = torch.get_rng_state()
    a, b, again = (torch.randn(10_000, generator=generator(0, n)) for n in ("a", "b", "a"))
    assert torch.equal(a, again)
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.04  # four standard errors
    assert torch.equal(torch.get_rng_state(), before)


def test_a_stream_starts_at_its_seed_and_gives_the_caller_his_own_back():
    torch.manual_seed(9)
    torch.rand(3)
    expected = torch.rand(5, generator=torch.Generator().manual_seed(4))
    before = torch.get_rng_state()
    with seeded(4, CPU):
        assert torch.equal(torch.rand(5), expected)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_apple_gpu_has_its_stream_seeded_and_gets_its_own_back(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: "former")
    monkeypatch.setattr(torch.mps, "manual_seed", lambda seed: calls.append(seed))
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state: calls.append(state))
    with seeded(4, torch.device("mps")):
        assert calls == [4]
    assert calls == [4, "former"]


def test_the_callers_state_returns_after_an_exception_too():
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError), seeded(4, CPU):
        torch.rand(5) @ torch.rand(4)
    assert torch.equal(torch.get_rng_state(), before)


def test_streams_nest():
    with seeded(1, CPU):
        whole = torch.rand(4)
    with seeded(1, CPU):
        first = torch.rand(2)
        with seeded(2, CPU):
            torch.rand(7)
        assert torch.equal(torch.cat([first, torch.rand(2)]), whole)
