"""The benchmark notices wrong sides, counts memory exactly, takes ratios round by round, and writes what it found."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
import torch
from loading import loaded_recipe
from torch import nn


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    with loaded_recipe("benchmark") as module:
        yield module


@pytest.fixture(autouse=True)
def threads_restored():
    """The recipe sets torch's threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def smoke(benchmark: ModuleType, folder: Path, *extra, arguments=()):
    report = ["--report", str(folder / "report.md"), "--summary", str(folder / "README.md")]
    return benchmark.main(["--smoke", "--rounds", "2", "--other-rounds", "1", *report, *arguments], extra)


@pytest.fixture
def short(benchmark, monkeypatch):
    """A smoke run of two sides, one batch size."""
    (case,) = benchmark.SUITES["smoke"]
    case = dataclasses.replace(case, variants=(), peers=False, largest_batch=False)
    monkeypatch.setitem(benchmark.SUITES, "smoke", (case,))


def test_a_smoke_run_writes_report_json_and_summary(benchmark, tmp_path, capsys):
    (tmp_path / "README.md").write_text("# Title\n")
    record = smoke(benchmark, tmp_path, arguments=["--json"])
    content = json.loads((tmp_path / "report.json").read_text())
    assert json.loads(capsys.readouterr().out) == content
    sides = {side["name"]: side for side in content["cases"][0]["sides"]}
    assert {"non-private", "ours, one pass", "ours, two passes", "ours, one pass, mixed"} <= set(sides)
    assert all(side["fault"] is None for side in sides.values() if side["ours"])
    assert sides["non-private"]["time_ratio"]["median"] == sides["non-private"]["memory_ratio"] == 1
    assert len(sides["ours, one pass"]["cpu"]) == 2 and len(sides["ours, two passes"]["cpu"]) == 1
    assert set(sides["ours, one pass"]["peaks"]) == {"4", "8", "16", "32"}
    assert sides["non-private"]["largest_batch"] > 1000
    assert content["versions"]["torch"] == version("torch") and content["hardware"]
    row = next(line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("| tiny"))
    summary = (tmp_path / "README.md").read_text()
    assert row in summary and summary.startswith("# Title\n")
    assert record.command in (tmp_path / "report.md").read_text()
    assert (tmp_path / "report.png").exists() == (importlib.util.find_spec("matplotlib") is not None)


def test_a_second_run_replaces_the_summary(benchmark, short, tmp_path):
    for _ in range(2):
        smoke(benchmark, tmp_path)
    assert (tmp_path / "README.md").read_text().count("| tiny") == 1


def wrong_side(benchmark: ModuleType, ours: bool, change):
    """Our side with its gradients changed before they are returned."""
    from benchmarking.sides import Ours

    class Wrong(Ours):
        def step(self, batch):
            gradients = super().step(batch)
            change(gradients)
            return gradients

    side = Wrong()
    side.name, side.ours = "wrong", ours
    return side


def scale_one(gradients):
    gradients["0.weight"] *= 1.05


def scale_a_little(gradients):
    for gradient in gradients.values():
        gradient *= 1.0005


def lose_one(gradients):
    del gradients["4.bias"]


def poison(gradients):
    gradients["0.weight"][0] = float("nan")


@pytest.mark.parametrize("change", [scale_one, scale_a_little, lose_one, poison])
def test_a_peer_with_wrong_gradients_is_named_and_marked(benchmark, short, tmp_path, change):
    record = smoke(benchmark, tmp_path, wrong_side(benchmark, False, change))
    side = record.cases[0].find("wrong")
    assert "wrong gradient" in side.fault or "gradients of other parameters" in side.fault
    report = (tmp_path / "report.md").read_text()
    assert f"- wrong: {side.fault}" in report and f"| wrong | {side.fault} |" in report
    assert len(side.cpu) == 1


def test_one_of_our_sides_with_wrong_gradients_fails_the_run_after_writing(benchmark, short, tmp_path):
    with pytest.raises(SystemExit, match="tiny.*: wrong: wrong gradient"):
        smoke(benchmark, tmp_path, wrong_side(benchmark, True, scale_one))
    assert "wrong gradient" in (tmp_path / "report.json").read_text()


def test_a_peer_that_raises_is_not_timed_and_its_reason_stands_in_the_report(benchmark, short, tmp_path):
    def refuse(gradients):
        raise NotImplementedError("no such layer\nand more")

    side = smoke(benchmark, tmp_path, wrong_side(benchmark, False, refuse)).cases[0].find("wrong")
    assert side.fault == "cannot run: NotImplementedError: no such layer" and not side.cpu and not side.peaks
    assert side.fault in (tmp_path / "report.md").read_text()


def test_the_loop_is_the_sum_of_scaled_gradients(benchmark):
    from benchmarking.sides import Loop

    loop = Loop([{"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}, {"a": torch.tensor([0.0]), "b": torch.ones(1)}])
    assert loop.norms.tolist() == [5.0, 1.0]
    assert {name: float(total) for name, total in loop.plain().items()} == {"a": 3.0, "b": 5.0}
    clipped = {name: float(total) for name, total in loop.clipped(2.5).items()}
    assert clipped == pytest.approx({"a": 1.5, "b": 3.0})


def test_ratios_are_taken_round_by_round(benchmark):
    from benchmarking.measure import CaseResult, Spread

    base, side = {0: 1.0, 1: 10.0, 2: 2.0, 3: 4.0}, {0: 2.0, 1: 10.0, 2: 6.0}
    assert CaseResult.ratio_of(side, base) == Spread(median=2.0, low=1.5, high=2.5, count=3)
    assert CaseResult.ratio_of({}, base) is None
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 1)


def test_the_peak_counts_every_allocation_and_what_was_released_again(benchmark):
    from benchmarking.measure import peak

    def step():
        first = torch.empty(1000, 1000)  # 4 MB
        second = torch.empty(500, 1000)  # 6 MB are held
        del first
        return second, torch.empty(250, 1000)  # 3 MB

    assert peak(step, torch.device("cpu")) == 6_000_000


def test_the_largest_batch_fills_the_memory_that_the_parameters_leave(benchmark):
    from benchmarking.measure import SideResult, largest_batch

    side = SideResult("x", ours=True, peaks={4: 900, 8: 1100, 16: 1900}, resident=2**30 - 10_300)
    assert largest_batch(side, 1.0) == 100  # 300 + 100 n, by the two largest
    assert largest_batch(SideResult("x", ours=True, peaks={4: 700}), 1.0) is None


def test_freezing_raw_parameters_leaves_the_plain_layers(benchmark):
    from benchmarking.cases import Case, Trained, build, freeze

    case = Case("ViT", "vit_tiny_patch16_224", 32, 2, Trained.LAYERS)
    model = build(case, seed=0)
    freeze(model, case.trained)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["cls_token", "pos_embed"]


@pytest.mark.parametrize("name", ["vgg19_cifar", "resnet18_cifar"])
def test_models_for_32_pixels_have_no_batchnorm_and_the_known_size(benchmark, name):
    from benchmarking.cases import BUILT_HERE

    model = BUILT_HERE[name]()
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert millions == pytest.approx({"vgg19_cifar": 20.04, "resnet18_cifar": 11.17}[name], abs=0.01)


def test_the_report_tells_why_a_step_does_not_cost_less(benchmark, short, tmp_path):
    record = smoke(benchmark, tmp_path)
    found = record.cases[0].reasons
    operations, memory = found.operations, found.memory
    assert operations.non_private == operations.same_parameters
    assert operations.least <= operations.gram + operations.instantiation + operations.sums
    assert memory.least <= memory.planned
    assert sum(ours for _, ours in found.profile.values()) > 0
    report = (tmp_path / "report.md").read_text()
    assert "## Why not less" in report and "| convolutions, backward |" in report
    assert f"| {operations.least_ratio:.2f} | {operations.planned_ratio:.2f} |" in report
    assert "#why-not-less" in (tmp_path / "README.md").read_text()
    content = json.loads((tmp_path / "report.json").read_text())["cases"][0]["reasons"]
    assert content["operations"]["least_ratio"] == operations.least_ratio
    assert set(content["profile"]) == set(found.profile)


def test_the_operations_of_the_plan_are_those_that_torch_counts(benchmark):
    from benchmarking.floor import reasons
    from benchmarking.sides import NonPrivate, Ours

    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32), nn.Flatten(), nn.Linear(7 * 32, 10))
    batch = {"x": torch.randn(4, 7, 64), "y": torch.arange(4)}
    sides = NonPrivate(), Ours()
    for side in sides:
        side.prepare(model, 1.0)
    operations = reasons(model, model, *sides, batch).operations
    of_the_head = 4 * 2 * (7 * 32 + 10)  # one position: squared lengths instead of products
    assert operations.gram == 4 * 2 * 7**2 * (64 + 64 + 64 + 32) + of_the_head
    assert operations.counted - operations.same_parameters == operations.gram - of_the_head
    assert operations.instantiation == 0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::addmm", "matrix products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention kernels"),
        ("aten::mkldnn_convolution", "convolutions, forward"),
        ("aten::_slow_conv2d_backward", "convolutions, backward"),
        ("aten::native_group_norm_backward", "norm layers"),
        ("aten::gelu_backward", "element-wise, sums"),
        ("aten::copy_", "allocation, copies"),
        ("aten::resolve_conj", "Python, views, autograd"),
        ("ConvUseBackward", "Python, views, autograd"),
    ],
)
def test_operators_are_told_apart_by_kind(benchmark, name, kind):
    from benchmarking.floor import by_kind

    kinds = by_kind({name: 2.0}, 5.0)
    assert kinds[kind] == (5.0 if kind == "Python, views, autograd" else 2.0) and sum(kinds.values()) == 5.0


def test_the_least_operations_are_half_gram_matrices_or_kept_gradients(benchmark):
    from benchmarking.floor import least_operations

    from hf_dpvision.rules.affine import AffineShape

    assert least_operations(AffineShape(10, 100, 200)) == 10 * 10 * 300
    assert least_operations(AffineShape(10, 100, 200, readers=2)) == 10 * 10 * 250
    assert least_operations(AffineShape(300, 100, 200)) == 2 * 100 * 200  # no larger than its operands
    assert least_operations(AffineShape(1000, 3, 2, groups=4, held=1)) == 2 * 1000 * 3 * 2 * 4
