"""The physical batch size that fits: found on random examples, never larger than useful, and it changes nothing."""

from __future__ import annotations

import pytest
import torch
from trainer_cases import Images, tiny_vit, trainer, weights

from hf_dpvision import fitting
from hf_dpvision.errors import ArgumentRefused, DeviceMemoryError
from hf_dpvision.fitting import free_bytes, largest_batch, peak_bytes


CPU = torch.device("cpu")


def numbers(count: int) -> torch.Tensor:
    """Allocates a MiB for each of `count`, and one for all."""
    return torch.zeros(2**18) + torch.zeros(count, 2**18).sum(0)


def test_the_peak_is_what_was_alive_at_once():
    assert peak_bytes(lambda: torch.zeros(2**18), CPU) == 2**20
    assert peak_bytes(lambda: [torch.zeros(2**18) for _ in range(3)], CPU) == 3 * 2**20
    assert 6 * 2**20 <= peak_bytes(lambda: numbers(5), CPU) <= 9 * 2**20


def test_the_size_follows_the_line_through_two_peaks(monkeypatch):
    monkeypatch.setattr(fitting, "free_bytes", lambda device: 100 * 2**20)
    size = largest_batch(numbers, CPU, most=10_000)
    assert peak_bytes(lambda: numbers(size), CPU) <= 80 * 2**20 < peak_bytes(lambda: numbers(size + 4), CPU)


def test_no_more_than_is_useful():
    assert largest_batch(numbers, CPU, most=3) == 3
    assert largest_batch(numbers, CPU, most=1) == 1


def test_a_device_that_runs_out_of_memory_gets_half(monkeypatch):
    asked = []

    def full_at_seven(count: int) -> None:
        asked.append(count)
        if count >= 7:
            raise torch.OutOfMemoryError("out of memory")

    assert largest_batch(full_at_seven, CPU, most=40) == 5
    assert asked[-4:] == [40, 20, 10, 5]


def full_from(limit: int):
    """Runs out of memory from that many examples on."""

    def run(count: int) -> None:
        if count >= limit:
            raise torch.OutOfMemoryError("out of memory")

    return run


@pytest.mark.parametrize(("limit", "size"), [(2, 1), (3, 2), (5, 3)])
def test_a_device_that_holds_hardly_anything_gets_what_it_holds(limit, size):
    assert largest_batch(full_from(limit), CPU, most=6) == size


def test_a_device_that_cannot_hold_one_is_refused():
    with pytest.raises(DeviceMemoryError, match="single example, before step 0"):
        largest_batch(full_from(1), CPU, most=4)


def test_other_errors_pass_through():
    def broken(count: int) -> None:
        raise RuntimeError("the model is broken")

    with pytest.raises(RuntimeError, match="the model is broken"):
        largest_batch(broken, CPU, most=4)


def test_the_limit_of_a_container_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    assert free_bytes(CPU) == 600
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(CPU) > 600


@pytest.mark.parametrize("asked", [{"per_device_train_batch_size": "auto"}, {"auto_find_batch_size": True}])
def test_a_run_with_a_found_size_gives_the_same_weights_and_spends_the_same(tmp_path, asked):
    plain = trainer(tmp_path / "plain", tiny_vit(), per_device_train_batch_size=3)
    plain.train()
    data = Images()
    found = trainer(tmp_path / "found", tiny_vit(), train_dataset=data, **asked)
    found.train()
    assert found.args.per_device_train_batch_size == 20  # 8 expected, and four standard deviations
    assert (weights(plain.model) - weights(found.model)).abs().max() < 1e-6
    assert found.epsilon() == plain.epsilon()
    assert data.seen.count(0) <= 1 + 4  # the search has looked at no private example


def test_with_fsdp_a_number_is_needed(tmp_path, monkeypatch):
    run = trainer(tmp_path, per_device_train_batch_size="auto")
    run.args.fsdp, run.args.fsdp_config, run.args.backward_passes = True, {}, 2
    monkeypatch.setattr(type(run.args), "world_size", 2)
    with pytest.raises(ArgumentRefused, match="per_device_train_batch_size=8: with fsdp"):
        run.train()
