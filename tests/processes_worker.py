"""One process of a run of several, for test_processes.py: `processes_worker.py JOB... FOLDER`, under a launcher.

With `--fork` it starts its two processes itself, without a launcher that would end the survivors of a crash.

Long, because its jobs are independent, one for each property that test_processes.py looks at, behind one door.
"""

from __future__ import annotations

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gc  # noqa: E402
import hashlib  # noqa: E402
import json  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402
from trainer_cases import CLASSES, Images, Linear, Pictures, tiny_vit, trainer, visits, weights  # noqa: E402
from transformers import (  # noqa: E402
    BeitConfig,
    BeitForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    TrainerCallback,
)

from hf_dpvision import agreement  # noqa: E402
from hf_dpvision.accounting.journal import FILE, FOLDER  # noqa: E402
from hf_dpvision.batchnorm import replace_batchnorm, to_group_norm  # noqa: E402
from hf_dpvision.errors import ArgumentRefused, CheckpointError, ModelRefused  # noqa: E402
from hf_dpvision.mechanism import FixedRandomness, SystemRandomness  # noqa: E402


RANK = 0


def tiny_beit() -> nn.Module:
    """A BEiT of two blocks with relative position tables and layer scales."""
    torch.manual_seed(0)
    return BeitForImageClassification(
        BeitConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16,
            patch_size=8, num_labels=CLASSES, use_relative_position_bias=True, drop_path_rate=0.0,
        )
    )  # fmt: skip


def tiny_resnet() -> nn.Module:
    """A ResNet of two stages with GroupNorm."""
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=CLASSES
    )
    return replace_batchnorm(ResNetForImageClassification(config), to_group_norm)


MODELS = {"vit": tiny_vit, "beit": tiny_beit, "resnet": tiny_resnet}


def noise_run(folder: Path, **changes: Any) -> Any:
    """A run of 40 steps that release only noise: a draw is empty (about every third) or its gradients are zero."""
    data = Images()
    data.pixels[:] = float("nan")
    return trainer(
        folder, Linear(), train_dataset=data, seed=7, logical_batch_size=1, max_steps=40, noise_multiplier=1.5,
        per_sample_max_grad_norm=0.3, **changes,
    )  # fmt: skip


class Hashes(TrainerCallback):
    """Notes a hash of the weights after every step, and dies in the middle of one if told to."""

    def __init__(self, die_after: int | None = None) -> None:
        self.of_step: list[str] = []
        self.die_after = die_after

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.of_step.append(hashlib.sha256(weights(model).numpy().tobytes()).hexdigest())
        if state.global_step == self.die_after:
            os._exit(3)


def run_of(model: nn.Module, folder: Path, **changes: Any) -> tuple[Any, list[str]]:
    """Train for 20 steps; return the trainer and the hashes after each step."""
    hashes = Hashes(changes.pop("die_after", None))
    run = trainer(folder, model, max_steps=changes.pop("max_steps", 20), callbacks=[hashes], **changes)
    run.train()
    return run, hashes.of_step


def job_equality(folder: Path) -> None:
    """Each family, from other initial weights on rank 1 and with its own output folder, with one checkpoint."""
    for name, build in MODELS.items():
        model = build()
        if RANK:
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.is_floating_point():
                    tensor.data.add_(torch.randn_like(tensor))
        own = folder / name / f"files{RANK}"
        run, hashes = run_of(model, own, save_strategy="steps", save_steps=20, self_check=True)
        run.save_model()
        run.create_model_card()
        report(folder / name, hashes=hashes, epsilon=run.epsilon().upper, world=run.args.world_size)
        if RANK == 0:
            torch.save(weights(run.model), folder / name / "weights.pt")


class OwnShardOfTheNoise(FixedRandomness):
    """The noise of one process, cut as FSDP2 cuts parameters, so that a sharded run can be compared with a plain one.

    Real noise is drawn by every process for its own shard.
    """

    def __init__(self, seed: int, shapes: list[tuple[int, ...]], world: int) -> None:
        super().__init__(seed)
        object.__setattr__(self, "shapes", shapes)
        object.__setattr__(self, "world", world)

    def noise_source(self, device: torch.device) -> Any:
        whole = super().noise_source(device)

        def source(step: int) -> Any:
            drawn, shapes, world = whole(step), iter(self.shapes), self.world

            class Shards:
                algorithm, cryptographic = drawn.algorithm, drawn.cryptographic

                def normal(self, shape: tuple[int, ...], std: float) -> torch.Tensor:
                    parts = drawn.normal(next(shapes), std).chunk(world)
                    own = parts[RANK] if RANK < len(parts) else parts[0][:0]
                    assert own.shape == tuple(shape)
                    return own

            return Shards()

        return source


def gathered(model: nn.Module) -> torch.Tensor:
    """All parameters of a sharded model as one vector; every process has to ask for it."""
    return torch.cat([parameter.detach().full_tensor().reshape(-1) for parameter in model.parameters()])


SHARDED_RUN = {
    "max_steps": 20, "save_strategy": "steps", "save_steps": 10, "save_total_limit": 3, "optim": "adamw_torch",
    "learning_rate": 0.01,
}  # fmt: skip


# Not with Adam, which makes a step of rounding where a gradient is zero, as that of the bias of keys.
PLAIN_GRADIENTS = {
    "disable_dp": True, "noise_multiplier": None, "save_strategy": "no", "optim": "sgd", "learning_rate": 0.1,
}  # fmt: skip


def sharded_run(folder: Path, model: nn.Module, **changes: Any) -> Any:
    """A trainer that spreads the model over both processes, with the noise of one process."""
    shapes = [tuple(parameter.shape) for parameter in model.parameters()]
    return trainer(folder, model, randomness=OwnShardOfTheNoise(0, shapes, 2), fsdp=True, **SHARDED_RUN | changes)


def as_after_step(ten: int, run_folder: Path, folder: Path) -> Path:
    """Give `folder` the ledger of a run as it was after that step; return the run's checkpoint of then."""
    if RANK == 0:
        lines = (run_folder / FOLDER / FILE).read_bytes().splitlines(keepends=True)
        (folder / FOLDER).mkdir(parents=True)
        (folder / FOLDER / FILE).write_bytes(b"".join(lines[: 2 + ten]))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return run_folder / f"checkpoint-{ten}"


def job_sharded(folder: Path) -> None:
    """Each family spread over both processes; then resumed from its checkpoint, and from that of one process."""
    for name, build in MODELS.items():
        own = folder / "sharded" / name
        run = sharded_run(own / "files", build(), self_check=True, eval_dataset=Images(8))
        run.train()
        found = {"through": gathered(run.model)}
        loss = run.evaluate()["eval_loss"]
        run.save_model()
        for kind, origin in {"resumed": own / "files", "from_one": folder / "plain" / name}.items():
            point = as_after_step(10, origin, own / kind)
            again = sharded_run(own / kind, build(), save_strategy="no")
            again.train(resume_from_checkpoint=str(point))
            found[kind] = gathered(again.model)
        with pytest.raises(ArgumentRefused, match="new DPTrainer and a model that is in one piece"):
            run.train(resume_from_checkpoint=True)
        held = sum(parameter.to_local().numel() for parameter in run.model.parameters())
        report(own, epsilon=run.epsilon().upper, held=held, loss=loss)
        if RANK == 0:
            torch.save(found, own / "weights.pt")


class Sneaky(nn.Module):
    """Uses the weight of a block after the block has run."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(48, 48), nn.GELU()) for _ in range(2))
        self.head = nn.Linear(48, CLASSES)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        x = nn.functional.avg_pool2d(pixel_values, 4).flatten(1)
        for block in self.blocks:
            x = x + block(x)
        return self.head(nn.functional.linear(x, self.blocks[0][0].weight))


def job_sharded_sneaky(folder: Path) -> None:
    """A model that works as a whole, but not in these shards."""
    run = trainer(folder / "sneaky", Sneaky(), fsdp=True, self_check=True)
    try:
        run.train()
        found = "it trained"
    except ModelRefused as refusal:
        found = str(refusal)
    report(folder / "sneaky", refusal=found, epsilon=run.epsilon().upper)


def job_sharded_noise(folder: Path) -> None:
    """Only noise is released, each process drawing that of its own shards."""
    torch.manual_seed(0)
    run = noise_run(folder / "sharded_noise", randomness=SystemRandomness(), fsdp=True)
    start = weights(run.model)
    run.train()
    moved = gathered(run.model) - start
    if RANK == 0:
        torch.save(moved, folder / "sharded_noise" / "moved.pt")


def job_sharded_without_privacy(folder: Path) -> None:
    """The baseline through the same path."""
    run = sharded_run(folder / "baseline", tiny_vit(), **PLAIN_GRADIENTS)
    run.train()
    found = gathered(run.model)
    if RANK == 0:
        torch.save(found, folder / "baseline" / "weights.pt")


OPTIMISING_RUN = {
    "max_steps": 12, "learning_rate": 0.01, "save_strategy": "steps", "save_steps": 8, "eval_dataset": Images(8),
    "eval_strategy": "steps", "eval_steps": 5,
}  # fmt: skip
OPTIMISING = {
    "tail": {"tail_averaging": 6, "low_pass_filter": 2, "optim": "sgd"},
    "exponential": {"ema_decay": 0.8, "noise_bias_correction": True, "optim": "adamw_torch"},
}


def losses_and_spread(run: Any, metrics: dict[str, float]) -> list[float]:
    """What evaluations in between found, and how far averaged iterates lie apart."""
    losses = [logs["eval_loss"] for logs in run.state.log_history if "eval_loss" in logs]
    return losses + [value for name, value in metrics.items() if "std" in name]


def job_optimising(folder: Path) -> None:
    """What comes behind the noise, with the model whole on both processes, and sharded; the latter also resumed."""
    shapes = [tuple(parameter.shape) for parameter in tiny_vit().parameters()]
    for name, changes in OPTIMISING.items():
        own, settings = folder / "optimising" / name, OPTIMISING_RUN | changes
        whole = trainer(own / "whole", tiny_vit(), **settings)
        told = {"whole": losses_and_spread(whole, whole.train().metrics)}
        found = {"whole": weights(whole.model)}
        settings |= {"fsdp": True, "randomness": OwnShardOfTheNoise(0, shapes, 2)}
        sharded = trainer(own / "sharded", tiny_vit(), **settings)
        told["sharded"] = losses_and_spread(sharded, sharded.train().metrics)
        found["sharded"] = gathered(sharded.model)
        point = as_after_step(8, own / "sharded", own / "resumed")
        again = trainer(own / "resumed", tiny_vit(), **settings | {"save_strategy": "no"})
        told["resumed"] = losses_and_spread(again, again.train(resume_from_checkpoint=str(point)).metrics)
        found["resumed"] = gathered(again.model)
        report(own, told=told)
        if RANK == 0:
            torch.save(found, own / "weights.pt")


def job_rare(folder: Path) -> None:
    """One example per step on average, so that a process often has none."""
    run, hashes = run_of(tiny_vit(), folder / "rare", logical_batch_size=1)
    report(folder / "rare", hashes=hashes)
    if RANK == 0:
        torch.save(weights(run.model), folder / "rare" / "weights.pt")


def job_noise(folder: Path) -> None:
    """Only noise is released; both processes start from the same weights, so that the movement is all noise."""
    torch.manual_seed(0)
    run = noise_run(folder / "noise")
    start = weights(run.model)
    run.train()
    report(folder / "noise", loaded=run.train_dataset.seen[1:])
    if RANK == 0:
        torch.save(weights(run.model) - start, folder / "noise" / "moved.pt")


def job_disagreement(folder: Path) -> None:
    """One process has another argument, data set, model or code; the refusals are reported."""
    own_code = agreement.code
    found = {}
    for what in ("learning_rate", "size", "model", "code"):
        changes = {"learning_rate": 0.2} if (what, RANK) == ("learning_rate", 1) else {}
        data = Images(65 if (what, RANK) == ("size", 1) else 64)
        model = Linear()
        if (what, RANK) == ("model", 1):
            model.head.bias.requires_grad_(False)
        agreement.code = (lambda: "another") if (what, RANK) == ("code", 1) else own_code
        run = trainer(folder / "disagreement", model, train_dataset=data, **changes)
        try:
            run.train()
        except ArgumentRefused as refusal:
            found[what] = [str(refusal), run.epsilon().upper]
    agreement.code = own_code
    report(folder / "disagreement", refusals=found)


def job_die(folder: Path) -> None:
    """Rank 1 ends after three of twenty steps, without a word."""
    run_of(Linear(), folder / "die", die_after=3 if RANK else None, eval_dataset=Images(8))


def resumable(folder: Path, model: nn.Module, **changes: Any) -> Any:
    """A trainer for ten steps, eight per epoch, with a checkpoint behind each and a loading worker."""
    settings = {"max_steps": 10, "save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
    return trainer(folder, model, **settings | {"optim": "adamw_torch", "dataloader_num_workers": 1} | changes)


# Three at once, so that microbatches of a batch of about eight are full and not, and their number is odd and even.
EXACT = {"full_determinism": True, "per_device_train_batch_size": 3}


def resumed(through: Path, behind: int, folder: Path, model: nn.Module, **changes: Any) -> torch.Tensor:
    """Take a finished run up again behind an earlier step, with the ledger of that moment; return the weights."""
    if RANK == 0:
        lines = (through / FOLDER / FILE).read_bytes().splitlines(keepends=True)
        (folder / FOLDER).mkdir(parents=True)
        (folder / FOLDER / FILE).write_bytes(b"".join(lines[: 2 + behind]))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    torch.manual_seed(12345)  # what another process would have
    run = resumable(folder, model, save_strategy="no", **changes)
    run.train(resume_from_checkpoint=str(through / f"checkpoint-{behind}"))
    return weights(run.model)


def job_resume(folder: Path) -> None:
    """Each family: a run of two processes, taken up again by two, and runs of one process taken up by two.

    With exact sums; the one with dropout, whose masks are drawn in each process, as by default.
    """
    for name, build in (("dropout", lambda: tiny_vit(0.1)), *MODELS.items()):
        own = folder / name
        changes = EXACT if name in MODELS else {}
        run = resumable(own / "two", build(), **changes)
        run.train()
        found = {"two": weights(run.model)}
        for behind in (3, 8):
            for origin in ("two", "one") if name in MODELS else ("two",):
                target = f"{origin}-two-{behind}"
                found[target] = resumed(own / origin, behind, own / target, build(), **changes)
        torch.save(found, own / f"weights{RANK}.pt")


def job_terminate(folder: Path) -> None:
    """Rank 1 alone is asked to end, in its third step."""

    class Asked(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if RANK == 1 and state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    run = resumable(folder / "terminate", Linear(), callbacks=[Asked()])
    try:
        run.train()
    except SystemExit as ended:
        report(folder / "terminate", code=ended.code, step=run.state.global_step)


def job_full(folder: Path) -> None:
    """One process cannot write its part of the second checkpoint: first rank 1, then, in a run of its own, rank 0."""
    for failing in (1, 0):
        run = resumable(folder / "full" / str(failing), Linear(), dataloader_num_workers=0)
        save = run._save_rng_state

        def full(target: str, run: Any = run, save: Any = save, failing: int = failing) -> None:
            if RANK == failing and run.state.global_step == 2:
                raise OSError(28, "No space left on device")
            save(target)

        run._save_rng_state = full
        try:
            run.train()
        except CheckpointError as error:
            report(folder / "full" / str(failing), message=str(error), step=run.state.global_step)


def job_units(folder: Path) -> None:
    """Six steps over units of several images, with the model whole on both processes, and sharded."""
    data = visits((1, 2, 3, 5, 7, 3, 1, 4)).with_transform(Pictures())
    settings = {
        "train_dataset": data, "privacy_unit_column": "patient", "examples_per_unit": 3, "logical_batch_size": 4,
        "max_steps": 6, "target_delta": 1e-3, "per_device_train_batch_size": 8,
    }  # fmt: skip
    whole = trainer(folder / "units" / "whole", tiny_vit(), **settings)
    whole.train()
    shapes = [tuple(parameter.shape) for parameter in whole.model.parameters()]
    noise = OwnShardOfTheNoise(0, shapes, 2)
    sharded = trainer(folder / "units" / "sharded", tiny_vit(), randomness=noise, fsdp=True, **settings)
    sharded.train()
    found = {"whole": weights(whole.model), "sharded": gathered(sharded.model)}
    for kind, value in found.items() if RANK == 0 else ():
        torch.save(value, folder / "units" / f"{kind}.pt")


def report(folder: Path, **found: Any) -> None:
    """Write what this process found."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"report{RANK}.json").write_text(json.dumps(found))


def main(rank: int, jobs: list[str], folder: Path) -> None:
    """Do the jobs one after the other, as one of two processes."""
    global RANK
    RANK = rank
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    for job in jobs:
        globals()[f"job_{job}"](folder)


def fork(jobs: list[str], folder: Path) -> None:
    """Start both processes by hand; exit with 1 if rank 0 ended by an error, whose text it printed."""
    children = {}
    for rank in (0, 1):
        pid = os.fork()
        if pid == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
            try:
                main(rank, jobs, folder)
            except Exception as error:
                print(f"rank {rank}: {type(error).__name__}: {error}", flush=True)
                os._exit(1)
            os._exit(0)
        children[pid] = rank
    codes = {children[pid]: os.waitstatus_to_exitcode(status) for pid, status in (os.wait(), os.wait())}
    print(f"exit codes {codes[0]} {codes[1]}")
    sys.exit(codes[0])


if __name__ == "__main__":
    *names, target = sys.argv[1:]
    if names[0] == "--fork":
        fork(names[1:], Path(target))
    else:
        main(int(os.environ["RANK"]), names, Path(target))
