"""The parts a run is put together from. A fault replaces one of them; the checks never know which."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor, nn
from torch.nn import functional as F

import hf_dpvision.drawing
import hf_dpvision.trainer
from hf_dpvision import DPTrainer, DPTrainingArguments
from hf_dpvision.clipping import Clipping
from hf_dpvision.mechanism import Mechanism, Randomness, SystemRandomness
from hf_dpvision.rules import RULES
from hf_dpvision.run import PrivacyRun
from hf_dpvision.sampling import PoissonSampler


Patch = Callable[[], AbstractContextManager[Any]]


def example_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each example, `[n]`."""
    return F.cross_entropy(logits, labels, reduction="none")


def unchanged(part: Any) -> Any:
    """Return the honest part itself."""
    return part


@dataclass(frozen=True)
class Parts:
    """What a run of the real `DPTrainer` is made of; as it stands, everything is honest.

    Args:
        trainer: the class.
        run: of the ledger over all calls of `train()`.
        randomness: makes where keys and noise come from, once per run.
        mechanism: takes the honest mechanism of a run and returns the one to be used.
        clipping: takes the honest clipping style and returns the one to be used.
        sampler: the class that says who takes part in which step.
        rules: torch function -> rule, beside those of the package.
        losses: `(logits, labels) -> [n]`.
        model: takes the honest model and returns the one to be trained.
        patches: what has no seam is replaced in a `with` block around the run.
    """

    trainer: type[DPTrainer] = DPTrainer
    run: type[PrivacyRun] = PrivacyRun
    randomness: Callable[[], Randomness] = SystemRandomness
    mechanism: Callable[[Mechanism], Mechanism] = unchanged
    clipping: Callable[[Clipping], Clipping] = unchanged
    sampler: type[PoissonSampler] = PoissonSampler
    rules: Mapping[Callable, Callable] = field(default_factory=dict)
    losses: Callable[[Tensor, Tensor], Tensor] = example_losses
    model: Callable[[nn.Module], nn.Module] = unchanged
    patches: tuple[Patch, ...] = ()

    def with_patch(self, target: object, name: str, value: object) -> Parts:
        """The same parts and one more patch of `target.name`."""
        return replace(self, patches=(*self.patches, lambda: mock.patch.object(target, name, value)))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """A block in which a trainer is built and run; everything is as before at its end."""
        parts = self

        built = DPTrainingArguments.build_clipping

        class Run(self.run):
            """Lends the mechanism to be used."""

            @contextmanager
            def started(self, *args: Any, **kwargs: Any) -> Iterator[Mechanism]:
                with super().started(*args, **kwargs) as mechanism:
                    yield parts.mechanism(mechanism)

        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(hf_dpvision.trainer, "PrivacyRun", Run))
            stack.enter_context(mock.patch.object(hf_dpvision.drawing, "PoissonSampler", self.sampler))
            build = lambda args: parts.clipping(built(args))  # noqa: E731 a method of the arguments for a while
            stack.enter_context(mock.patch.object(DPTrainingArguments, "build_clipping", build))
            stack.enter_context(mock.patch.dict(RULES, self.rules))
            for patch in self.patches:
                stack.enter_context(patch())
            yield

    def arguments(self, folder: Path, **settings: Any) -> DPTrainingArguments:
        """Quiet training arguments on the CPU; the learning rate is 0, so that every step sees the same weights."""
        common = {
            "target_delta": 1e-4, "learning_rate": 0.0, "lr_scheduler_type": "constant", "optim": "sgd",
            "use_cpu": True, "save_strategy": "no", "logging_strategy": "no", "report_to": "none",
            "disable_tqdm": True, "self_check": False, "accountant": "rdp", "run_report": False,
        }  # fmt: skip
        return DPTrainingArguments(str(folder), **common | settings)
