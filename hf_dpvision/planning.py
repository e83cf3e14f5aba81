"""What to run for a budget of privacy and of time: expected batch, steps, noise multiplier, learning rate.

Nothing here looks at private data. Every number follows from what is passed: the size of the data set, which is
public, the budgets, the speed on random images, and settings known from public data or from a run that was paid for.

The rules say where to start, and not what is best. Sander, Stock, Sablayrolles 2023, arXiv:2210.03403: what noise does
to training depends on the noise of an update, sigma / B, and on the number of updates T; and where sigma is above
about 2, epsilon depends on sqrt(T) B / sigma alone. So a plan is good if little of that is lost to a small sigma, and
if it has steps enough. The learning rate follows by `scaling_rules.distance_at`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import accounting
from .accounting import Event, Ledger, TruncatedNegativeBinomial
from .accounting.calibration import noise_multiplier_of_runs, noise_multiplier_of_search
from .errors import ArgumentRefused
from .scaling_rules import Reference, distance_at


_NEIGHBOURS = 2  # rows shown on each side of the recommended one
_FEW_STEPS = 30  # fewer leave an optimizer little to do
_ENOUGH_STEPS = 1000  # more are of little use when a pretrained model is fine-tuned
_MANY_STEPS = 20_000
_GOOD_SHARE = 0.9  # of the best signal found: within it, steps count for more
_RUNS = (3, 10)  # of a search, whose price is shown
_LESS = (0.5, 0.25)  # shares of the time for which the recommended batch is planned as well
_SMALLEST_PROXY = 16


@dataclass(frozen=True)
class Budget:
    """What may be spent.

    Args:
        epsilon: for one run.
        delta: of the guarantee.
        dataset_size: N, the number of training examples, which is public.
        hours: for one run.
        images_per_second: that a step works through.
        accountant: who certifies epsilon.

    Raises:
        ArgumentRefused: a value has no meaning.
    """

    epsilon: float
    delta: float
    dataset_size: int
    hours: float
    images_per_second: float
    accountant: str = "prv"

    def __post_init__(self) -> None:
        if self.dataset_size < 2:
            raise ArgumentRefused(f"dataset_size={self.dataset_size}: there is nobody to hide among.")
        if not self.delta * self.dataset_size < 1:
            raise ArgumentRefused(
                f"delta={self.delta:g} is not below 1 / {self.dataset_size} examples: publishing one whole example "
                "would satisfy such a guarantee. Leave it out for a value that suits the size."
            )
        for name in ("hours", "images_per_second"):
            if not 0 < getattr(self, name) < math.inf:
                raise ArgumentRefused(f"{name}={getattr(self, name):g} is no positive, finite number.")
        if self.images < 1:
            raise ArgumentRefused(
                f"In {self.hours:g} hours at {self.images_per_second:g} images a second not one image is trained on."
            )

    @property
    def images(self) -> float:
        """How many images can be worked through, counting each as often as it is drawn."""
        return self.hours * 3600 * self.images_per_second


def default_delta(dataset_size: int) -> float:
    """A delta that suits the size: the power of ten that is at least ten times below 1 / N, and at least 1e-12."""
    return max(1e-12, 10.0 ** -(math.ceil(math.log10(max(dataset_size, 2))) + 1))


@dataclass(frozen=True)
class Proposal:
    """One way to spend the budget.

    Attributes:
        logical_batch_size: B, expected.
        steps: T.
        epochs: how often an image is drawn, on average.
        noise_multiplier: sigma.
        epsilon: certified upper bound.
        update_noise: sigma / B, the noise of an update in units of the clip norm.
        signal: sqrt(T) q / sigma, as a share of what one release of the whole data set's gradient has at this epsilon.
        hours: that it takes.
        learning_rate: by the linear scaling rule; None without a reference.
    """

    logical_batch_size: int
    steps: int
    epochs: float
    noise_multiplier: float
    epsilon: float
    update_noise: float
    signal: float
    hours: float
    learning_rate: float | None


@dataclass(frozen=True)
class SearchPrice:
    """What a search over settings costs, if each of its runs is the one recommended.

    Attributes:
        runs: how many; with random stopping, how many on average.
        composed: epsilon of all of them together.
        stopped: epsilon of the best of a random, secret number of them (geometric), for that one alone.
        composed_noise, stopped_noise: noise multipliers at which the whole search stays within the target, by the
            Rényi bound, so that they are to compare with one another; a search calibrates its own.
    """

    runs: int
    composed: float
    stopped: float
    composed_noise: float
    stopped_noise: float


@dataclass(frozen=True)
class Proxy:
    """A run with the same noise in every update and the same steps that takes a fraction of the time.

    It protects nobody to speak of, and is for public data only.
    """

    logical_batch_size: int
    noise_multiplier: float
    cheaper: int


@dataclass(frozen=True)
class Proposals:
    """What was found.

    Attributes:
        proposals: those near the recommended one, in the whole time, by batch.
        recommended: index of the one recommended.
        why: in words.
        in_less_time: its batch with half and a quarter of the time.
        searches: what tuning would cost.
        proxy: how to tune on public data; None if the batch is small already.
    """

    proposals: tuple[Proposal, ...]
    recommended: int
    why: str
    in_less_time: tuple[Proposal, ...]
    searches: tuple[SearchPrice, ...]
    proxy: Proxy | None

    @property
    def best(self) -> Proposal:
        """The one recommended."""
        return self.proposals[self.recommended]


def propose(
    budget: Budget,
    references: Sequence[Reference] = (),
    noise_scale: float | None = None,
    progress: Callable[[], object] = lambda: None,
) -> Proposals:
    """Plan runs of many batch sizes within the budget, and recommend one.

    Args:
        budget: of privacy and time.
        references: none, one, or two with an epsilon each, through which the line of the scaling rule goes.
        noise_scale: the gradient noise scale in examples, if it is known; see `gradient_noise_scale`.
        progress: called behind each piece of work, `calibrations()` times at most.

    Raises:
        ArgumentRefused: the target cannot be reached in the time, or the references give no learning rate.
    """
    distance = distance_at(budget.epsilon, references)
    single = accounting.noise_multiplier(target_epsilon=budget.epsilon, delta=budget.delta, sample_rate=1.0, steps=1)

    def proposal(batch: int, share: float = 1.0) -> Proposal:
        found = _proposal(budget, batch, share, single, distance)
        progress()
        return found

    def price(best: Proposal, runs: int) -> SearchPrice:
        found = _price(budget, best, runs)
        progress()
        return found

    sketches = _sketches(budget)
    chosen, why = _recommended(sketches, noise_scale)
    first = max(0, chosen - _NEIGHBOURS)
    proposals = tuple(proposal(one.batch) for one in sketches[first : chosen + _NEIGHBOURS + 1])
    chosen -= first
    best = proposals[chosen]
    less = tuple(proposal(best.logical_batch_size, share) for share in _LESS if best.steps * share >= 1)
    searches = tuple(price(best, runs) for runs in _RUNS)
    return Proposals(proposals, chosen, why, less, searches, _proxy(best))


def calibrations() -> int:
    """How often `propose` calls `progress`, at most."""
    return 2 * _NEIGHBOURS + 1 + len(_LESS) + len(_RUNS)


@dataclass(frozen=True)
class _Sketch:
    """A batch in the whole time, calibrated by the Rényi bound, which is quick and as loose for all of them.

    Attributes:
        batch, steps: of the run.
        signal: sqrt(T) q / sigma.
    """

    batch: int
    steps: int
    signal: float


def _sketches(budget: Budget) -> list[_Sketch]:
    found = []
    for batch in _batches(budget):
        steps, rate = max(1, math.floor(budget.images / batch)), batch / budget.dataset_size
        sigma = accounting.noise_multiplier(
            target_epsilon=budget.epsilon, delta=budget.delta, sample_rate=rate, steps=steps, accountant="rdp"
        )
        found.append(_Sketch(batch, steps, math.sqrt(steps) * rate / sigma))
    return found


def _batches(budget: Budget) -> list[int]:
    """Powers of two, and the whole data set, rising; of those that the time suffices for, with a fitting length."""
    most = min(budget.dataset_size, math.floor(budget.images))
    possible = sorted({*(2**k for k in range(most.bit_length()) if 2**k <= most), most})
    fitting = [batch for batch in possible if _FEW_STEPS <= budget.images / batch <= _MANY_STEPS]
    return fitting or ([most] if budget.images / most > _MANY_STEPS else possible)


def _proposal(budget: Budget, batch: int, share: float, single: float, distance: float | None) -> Proposal:
    steps = max(1, math.floor(share * budget.images / batch))
    rate = batch / budget.dataset_size
    sigma = accounting.noise_multiplier(
        target_epsilon=budget.epsilon, delta=budget.delta, sample_rate=rate, steps=steps, accountant=budget.accountant
    )
    upper = Ledger([Event(rate, sigma, steps)]).epsilon(budget.delta, budget.accountant).upper
    return Proposal(
        logical_batch_size=batch,
        steps=steps,
        epochs=steps * rate,
        noise_multiplier=sigma,
        epsilon=upper,
        update_noise=sigma / batch,
        signal=math.sqrt(steps) * rate / sigma * single,
        hours=steps * batch / budget.images_per_second / 3600,
        learning_rate=None if distance is None else distance / steps,
    )


def _recommended(sketches: Sequence[_Sketch], noise_scale: float | None) -> tuple[int, str]:
    """Index and reason: of those that lose little signal, the best one whose steps are enough."""
    # the whole data set in every step is accounted for exactly, and would stand out by what the Rényi bound adds
    most = max(one.signal for one in sketches if one is not sketches[-1] or len(sketches) == 1)
    good = [index for index, one in enumerate(sketches) if one.signal >= _GOOD_SHARE * most]  # rising batches
    within = f"loses less than {1 - _GOOD_SHARE:.0%} of the signal that the best batch has in this time"
    known = [index for index in good if noise_scale is not None and sketches[index].batch <= noise_scale]
    if known:
        return known[-1], (
            f"it {within}, and of those it is the largest below the gradient noise scale of {noise_scale:g} examples, "
            "up to which a larger batch makes each step better by about as much as it makes steps fewer"
        )
    enough = [index for index in good if sketches[index].steps >= _ENOUGH_STEPS]
    if enough:
        return enough[-1], f"it has {_ENOUGH_STEPS} steps, more of which are of little use, and {within}"
    return good[0], f"it {within}, and of those it has the most steps, so that each may be small"


def _price(budget: Budget, best: Proposal, runs: int) -> SearchPrice:
    rate, sigma, steps = best.logical_batch_size / budget.dataset_size, best.noise_multiplier, best.steps
    stopping = TruncatedNegativeBinomial(runs)
    target, delta = budget.epsilon, budget.delta
    return SearchPrice(
        runs=runs,
        composed=Ledger([Event(rate, sigma, runs * steps)]).epsilon(delta, budget.accountant).upper,
        stopped=accounting.Search(None, stopping).epsilon(Ledger([Event(rate, sigma, steps)]), delta, "rdp").upper,
        composed_noise=noise_multiplier_of_runs(
            [(rate, runs * steps)], target_epsilon=target, delta=delta, accountant="rdp"
        ),
        stopped_noise=noise_multiplier_of_search(
            target_epsilon=target, delta=delta, sample_rate=rate, steps=steps, stopping=stopping
        ),
    )


def _proxy(best: Proposal) -> Proxy | None:
    """B / k and sigma / k: at the same steps and the same noise in every update (Sander et al. 2023, section 4)."""
    cheaper = 2 ** max(0, (best.logical_batch_size // _SMALLEST_PROXY).bit_length() - 1)
    if cheaper == 1:
        return None
    return Proxy(best.logical_batch_size // cheaper, best.noise_multiplier / cheaper, cheaper)
