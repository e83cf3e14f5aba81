"""Two processes do what one does: the same weights, noise of the same size, the same epsilon; and none waits forever.

The processes are started by torchrun and by accelerate, on one machine, with the gloo backend on the CPU.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launching import ACCELERATE, TORCHRUN, Launched, launch, launched_once
from processes_worker import (
    EXACT,
    MODELS,
    OPTIMISING,
    OPTIMISING_RUN,
    PLAIN_GRADIENTS,
    SHARDED_RUN,
    as_after_step,
    losses_and_spread,
    noise_run,
    resumable,
    resumed,
    run_of,
)
from scipy import stats
from trainer_cases import Images, tiny_vit, trainer, weights

from hf_dpvision import processes
from hf_dpvision.accounting.journal import read_journal
from hf_dpvision.checkpoints import find_resume_point, load_strictly


pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch has no gloo backend, without which two processes cannot talk on a CPU",
)

WORKER = Path(__file__).parent / "processes_worker.py"


def plain_runs(folder: Path) -> None:
    """The runs of `job_sharded` in one process, with a checkpoint after ten of their twenty steps."""
    for name, build in MODELS.items():
        run = trainer(folder / "plain" / name, build(), **SHARDED_RUN)
        run.train()
        torch.save(weights(run.model), folder / "plain" / name / "weights.pt")


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory) -> Path:
    """The folder in which two processes of torchrun did all jobs but the deadly one; logs/ has their output."""
    jobs = ("equality", "rare", "noise", "disagreement", "sharded", "sharded_noise", "sharded_without_privacy",
            "sharded_sneaky", "terminate", "full", "optimising")  # fmt: skip
    launched = launched_once(tmp_path_factory, "torchrun", TORCHRUN, WORKER, *jobs, prepare=plain_runs)
    assert launched.code == 0, launched.stderr[-3000:]
    return launched.folder


@pytest.fixture(scope="module")
def accelerated(tmp_path_factory) -> Launched:
    """What two processes of `accelerate launch` left behind, one of which died in their last job."""
    return launched_once(
        tmp_path_factory, "accelerate", ACCELERATE, WORKER, "equality", "sharded", "die", prepare=plain_runs
    )


@pytest.fixture(scope="module")
def folders(torchrun, accelerated) -> dict[str, Path]:
    """Launcher -> its folder."""
    return {"torchrun": torchrun, "accelerate": accelerated.folder}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, tuple[torch.Tensor, list[str], float]]:
    """Family -> weights, hashes and epsilon of the same run in one process."""
    found = {}
    for name, build in MODELS.items():
        run, hashes = run_of(build(), tmp_path_factory.mktemp(name))
        found[name] = (weights(run.model), hashes, run.epsilon().upper)
    return found


def reports(folder: Path) -> list[dict]:
    """What both processes wrote down."""
    return [json.loads((folder / f"report{rank}.json").read_text()) for rank in (0, 1)]


LAUNCHERS = pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
FAMILIES = pytest.mark.parametrize("family", MODELS)


@LAUNCHERS
@FAMILIES
def test_two_processes_equal_one_whatever_weights_the_second_started_with(folders, alone, launcher, family):
    together = torch.load(folders[launcher] / family / "weights.pt", weights_only=True)
    start = weights(MODELS[family]())
    assert (together - alone[family][0]).abs().max() < 1e-6
    assert (together - start).abs().max() > 1e-3  # something was learnt, and noise added


@LAUNCHERS
@FAMILIES
def test_processes_are_bit_identical_after_every_step(folders, launcher, family):
    first, second = reports(folders[launcher] / family)
    assert first["world"] == second["world"] == 2
    assert first["hashes"] == second["hashes"]
    assert len(set(first["hashes"])) == 20


@LAUNCHERS
@FAMILIES
def test_epsilon_does_not_depend_on_the_number_of_processes(folders, alone, launcher, family):
    for report in reports(folders[launcher] / family):
        assert report["epsilon"] == alone[family][2] > 0


def test_a_process_without_examples_takes_part_all_the_same(torchrun, tmp_path):
    first, second = reports(torchrun / "rare")
    assert len(first["hashes"]) == 20 and first["hashes"] == second["hashes"]
    run, _ = run_of(tiny_vit(), tmp_path, logical_batch_size=1)
    together = torch.load(torchrun / "rare" / "weights.pt", weights_only=True)
    assert (together - weights(run.model)).abs().max() < 1e-6


def test_every_drawn_example_is_loaded_by_exactly_one_process(torchrun, tmp_path):
    run = noise_run(tmp_path)
    run.train()
    first, second = (report["loaded"] for report in reports(torchrun / "noise"))
    assert first and second and sorted(first + second) == sorted(run.train_dataset.seen[1:])
    assert len(first) < 40  # some draws were empty


def test_noise_of_two_processes_has_the_standard_deviation_of_one(torchrun):
    # sum of squares of 2307 standard normals, exact chi-square quantiles; false-positive rate 1e-6
    moved = torch.load(torchrun / "noise" / "moved.pt", weights_only=True).double()
    std = 0.1 * 1.5 * 0.3 * 40**0.5  # learning rate, sigma, C, steps; the expected batch size is 1
    low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], moved.numel())
    assert low < float((moved / std).square().sum()) < high


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("learning_rate", "the argument learning_rate"),
        ("size", "the training set's size"),
        ("model", "the model's parameters"),
        ("code", "the package's code"),
    ],
)
def test_processes_that_disagree_are_refused_on_every_one_of_them_with_nothing_charged(torchrun, what, words):
    for report in reports(torchrun / "disagreement"):
        message, epsilon = report["refusals"][what]
        assert f"Process 1 differs from process 0 in {words}:" in message and "same command" in message
        assert epsilon == 0


@LAUNCHERS
@FAMILIES
def test_a_sharded_model_equals_that_of_one_process(folders, launcher, family):
    sharded = torch.load(folders[launcher] / "sharded" / family / "weights.pt", weights_only=True)["through"]
    alone = torch.load(folders[launcher] / "plain" / family / "weights.pt", weights_only=True)
    assert (sharded - alone).abs().max() < 1e-6
    assert (alone - weights(MODELS[family]())).abs().max() > 0.1  # something was learnt, and noise added


@FAMILIES
def test_each_process_holds_about_half_of_a_sharded_model(torchrun, family):
    held = [report["held"] for report in reports(torchrun / "sharded" / family)]
    total = weights(MODELS[family]()).numel()
    assert sum(held) == total and max(held) < 0.55 * total


@LAUNCHERS
@FAMILIES
def test_a_sharded_run_is_resumed_bit_for_bit_and_from_the_checkpoint_of_one_process(folders, launcher, family):
    found = torch.load(folders[launcher] / "sharded" / family / "weights.pt", weights_only=True)
    assert torch.equal(found["resumed"], found["through"])
    assert (found["from_one"] - found["through"]).abs().max() < 1e-6


@FAMILIES
def test_one_process_goes_on_from_the_checkpoint_of_a_sharded_run(torchrun, tmp_path, family):
    point = as_after_step(10, torchrun / "sharded" / family / "files", tmp_path)
    run = trainer(tmp_path, MODELS[family](), **SHARDED_RUN | {"save_strategy": "no"})
    run.train(resume_from_checkpoint=str(point))
    through = torch.load(torchrun / "sharded" / family / "weights.pt", weights_only=True)["through"]
    assert (weights(run.model) - through).abs().max() < 1e-6


@FAMILIES
def test_a_sharded_model_is_saved_whole_with_its_statement(torchrun, family):
    files = torchrun / "sharded" / family / "files"
    model = MODELS[family]()
    load_strictly(model, files)
    through = torch.load(torchrun / "sharded" / family / "weights.pt", weights_only=True)["through"]
    assert torch.equal(weights(model), through)
    statement = json.loads((files / "privacy.json").read_text())
    assert statement["accountant"]["upper"] == reports(torchrun / "sharded" / family)[0]["epsilon"]
    assert statement["trainable_parameters"]["trained"] == through.numel()


@FAMILIES
def test_a_sharded_model_is_evaluated_alike_on_every_process(torchrun, tmp_path, family):
    first, second = (report["loss"] for report in reports(torchrun / "sharded" / family))
    model = MODELS[family]()
    load_strictly(model, torchrun / "sharded" / family / "files")
    expected = trainer(tmp_path, model, eval_dataset=Images(8)).evaluate()["eval_loss"]
    assert first == second == pytest.approx(expected, rel=1e-5)


def test_every_shard_gets_noise_of_its_own_of_the_right_size(torchrun):
    # sum of squares of 2307 standard normals, exact chi-square quantiles; false-positive rate 1e-6
    moved = torch.load(torchrun / "sharded_noise" / "moved.pt", weights_only=True).double()
    normals = moved / (0.1 * 1.5 * 0.3 * 40**0.5)  # learning rate, sigma, C, steps; the expected batch size is 1
    low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], moved.numel())
    assert low < float(normals.square().sum()) < high
    # the first row is the first process's, the last one the second's; the same seed would have made them alike
    rows = normals[: 3 * 768].view(3, 768)
    correlation = float(torch.corrcoef(rows[[0, 2]])[0, 1])
    assert abs(correlation) < 0.19  # 5.2 standard deviations of 768 independent pairs


def test_a_model_that_does_not_bear_its_shards_is_refused_on_every_process_with_nothing_charged(torchrun):
    for report in reports(torchrun / "sneaky"):
        assert "cannot be spread over processes" in report["refusal"]
        assert "transformer_layer_cls_to_wrap" in report["refusal"] and report["epsilon"] == 0


def test_without_privacy_a_sharded_model_equals_that_of_one_process(torchrun, tmp_path):
    run = trainer(tmp_path, tiny_vit(), **SHARDED_RUN | PLAIN_GRADIENTS)
    run.train()
    sharded = torch.load(torchrun / "baseline" / "weights.pt", weights_only=True)
    assert (weights(run.model) - sharded).abs().max() < 1e-5


@pytest.mark.parametrize("name", OPTIMISING)
def test_what_comes_behind_the_noise_is_the_same_whole_sharded_and_resumed(torchrun, tmp_path, name):
    own = torchrun / "optimising" / name
    run = trainer(tmp_path, tiny_vit(), **OPTIMISING_RUN | OPTIMISING[name])
    told = losses_and_spread(run, run.train().metrics)
    found = torch.load(own / "weights.pt", weights_only=True)
    assert len(told) == (5 if name == "tail" else 3)
    for kind in ("whole", "sharded", "resumed"):
        assert (found[kind] - weights(run.model)).abs().max() < 1e-6, kind
        for report in reports(own):
            assert report["told"][kind] == pytest.approx(told, rel=1e-5), kind
    assert torch.equal(found["sharded"], found["resumed"])


def test_only_the_first_process_prints_and_writes(torchrun):
    def output(rank: int, stream: str) -> str:
        (log,) = (torchrun / "logs").glob(f"**/{rank}/{stream}.log")
        return log.read_text()

    assert output(0, "stdout").count("What this run will claim") == 25
    assert [line for line in output(1, "stdout").splitlines() if not line.startswith("[Gloo] ")] == []  # gloo's own
    assert "claim" not in output(1, "stderr") and "train_runtime" not in output(1, "stderr")
    for family in MODELS:
        written = {rank: torchrun / family / f"files{rank}" for rank in (0, 1)}
        assert (written[0] / "model.safetensors").exists() and (written[0] / "privacy.json").exists()
        # the state of dropout's generator, without which a resumed run would differ; transformers writes one each
        assert [path.name for path in written[1].rglob("*") if path.is_file()] == ["rng_state_1.pth"]


def test_a_process_that_dies_ends_the_launch(accelerated):
    done = [(accelerated.folder / family / "report0.json").exists() for family in MODELS]
    assert all(done), accelerated.stderr[-3000:]
    assert accelerated.code != 0
    assert "exitcode  : 3" in accelerated.stderr and "rank      : 1" in accelerated.stderr


def test_the_survivor_of_a_process_that_dies_ends_by_itself_and_says_why(tmp_path):
    ended = launch(str(WORKER), "--fork", "die", str(tmp_path))
    assert "exit codes 1 3" in ended.stdout and ended.returncode == 1, ended.stdout + ended.stderr[-3000:]
    assert "rank 0: ProcessLost: Process 0 of 2 waited for the others in vain" in ended.stdout
    assert "what was charged stays charged" in ended.stdout


def runs_of_one_process(folder: Path) -> None:
    """A whole run of each family in this process, which has one thread, as each of the two has."""
    for family, build in MODELS.items():
        run = resumable(folder / family / "one", build(), **EXACT)
        run.train()
        torch.save(weights(run.model), folder / family / "one.pt")


@pytest.fixture(scope="module")
def taken_up(tmp_path_factory) -> Path:
    """The folder in which two processes resumed their own runs and those of one process."""
    launched = launched_once(tmp_path_factory, "resuming", TORCHRUN, WORKER, "resume", prepare=runs_of_one_process)
    assert launched.code == 0, launched.stderr[-3000:]
    return launched.folder


BEHIND = pytest.mark.parametrize("behind", [3, 8], ids=["within an epoch", "at its end"])


@BEHIND
@pytest.mark.parametrize("family", [*MODELS, "dropout"])
def test_two_processes_resume_bit_for_bit(taken_up, family, behind):
    first, second = (torch.load(taken_up / family / f"weights{rank}.pt", weights_only=True) for rank in (0, 1))
    assert torch.equal(first["two"], first[f"two-two-{behind}"])
    assert all(torch.equal(first[name], second[name]) for name in first)


@BEHIND
@FAMILIES
def test_a_run_goes_on_with_another_number_of_processes_bit_for_bit(taken_up, tmp_path, family, behind):
    found = torch.load(taken_up / family / "weights0.pt", weights_only=True)
    one = torch.load(taken_up / family / "one.pt", weights_only=True)
    more = found[f"one-two-{behind}"]
    fewer = resumed(taken_up / family / "two", behind, tmp_path / "fewer", MODELS[family](), **EXACT)
    again = resumed(taken_up / family / "one", behind, tmp_path / "again", MODELS[family](), **EXACT)
    assert all(torch.equal(one, other) for other in (found["two"], more, fewer, again))


@FAMILIES
def test_two_processes_write_the_weights_of_one_after_every_step_bit_for_bit(taken_up, family):
    def saved(processes: str, step: int) -> bytes:
        return (taken_up / family / processes / f"checkpoint-{step}" / "model.safetensors").read_bytes()

    one = [saved("one", step) for step in range(1, 11)]
    assert one == [saved("two", step) for step in range(1, 11)] and len(set(one)) == 10


def test_all_processes_end_behind_the_same_step_when_one_is_asked_to(torchrun):
    assert reports(torchrun / "terminate") == [{"code": 143, "step": 3}] * 2
    assert find_resume_point(True, torchrun / "terminate").step == 3
    assert read_journal(torchrun / "terminate").ledger.steps == 3


@pytest.mark.parametrize("failing", [0, 1])
def test_all_processes_end_without_half_a_checkpoint_when_one_cannot_write_its_part(torchrun, failing):
    folder = torchrun / "full" / str(failing)
    for rank, report in enumerate(reports(folder)):
        why = "No space left" if rank == failing else "another process"
        assert report["step"] == 2 and why in report["message"]
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["checkpoint-1", "privacy"]
    assert find_resume_point(True, folder).step == 1


def test_with_one_process_nothing_is_exchanged():
    sums = {"weight": torch.ones(2)}
    processes.refuse_disagreement({"anything": "at all"})
    assert processes.total(sums) == sums and processes.same_key(b"key", torch.device("cpu")) == b"key"
