"""Windows over a stream are Poisson sampling: Bernoulli by row and step, independent, and the draw by index."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import pytest
from datasets import Features, IterableDataset, Value
from scipy import stats

from hf_dpvision.data import shards
from hf_dpvision.data.streams import RowStream, read_head
from hf_dpvision.sampling import LogicalBatchIndices, LogicalBatchLoader, PoissonSampler, new_key
from hf_dpvision.windows import Place, WindowChoice, Windows, folder_of


KEY = bytes(range(32))
FALSE_POSITIVE_RATE = 1e-6  # of each statistic, were the key random
SIZE, RATE, STEPS = 200, 0.1, 1000


def stream(size: int = SIZE) -> RowStream:
    def rows():
        for i in range(size):
            yield {"value": i}

    return RowStream(IterableDataset.from_generator(rows, features=Features(value=Value("int64"))))


class Passes:
    """Fills windows from a stream, and counts how often it is gone through."""

    def __init__(self, source: RowStream) -> None:
        self.source, self.features, self.count = source, read_head(source).features, 0

    def __call__(self, folder, choice, identity):
        self.count += 1
        shards.keep_rows(folder, self.source, self.features, choice, identity, lambda table, first: None)


def windows(folder, *, sampler=None, steps=8, end=STEPS, fill="own", run="r") -> Windows:
    sampler = sampler or PoissonSampler(KEY, SIZE, RATE)
    return Windows(folder, sampler, steps, end, {"run": run}, Passes(stream()) if fill == "own" else fill)


@lru_cache(maxsize=4)
def _opened(folder, window: int) -> list[int]:
    return shards.open_rows(folder_of(folder, window))["value"][:]


def values(folder, places: list[Place]) -> list[int]:
    """What the rows at these places hold: their place in the stream."""
    return [_opened(folder, place.window)[place.row] for place in places]


def membership(source: Iterator[list[int]]) -> np.ndarray:
    """Whether row i is in step s: bool `[steps, size]`."""
    found = np.zeros((STEPS, SIZE), dtype=bool)
    for step, members in enumerate(source):
        found[step, members] = True
    return found


def pvalues(found: np.ndarray) -> dict[str, float]:
    """The smallest p-value of each property, times the number of values looked at."""
    together = found.T.astype(float) @ found.astype(float)
    pairs = together[np.triu_indices(SIZE, 1)]
    later = {lag: int((found[:-lag] & found[lag:]).sum()) for lag in (1, 2, 3, 10)}
    sizes = found.sum(1)
    ratio = (STEPS - 1) * sizes.var(ddof=1) / (SIZE * RATE * (1 - RATE))
    return {
        "rate": stats.binomtest(int(found.sum()), found.size, RATE).pvalue,
        "rate of a row": SIZE * min(stats.binomtest(int(n), STEPS, RATE).pvalue for n in found.sum(0)),
        "batch size": 2 * min(stats.chi2.cdf(ratio, STEPS - 1), stats.chi2.sf(ratio, STEPS - 1)),
        "steps": 4 * min(stats.binomtest(both, found[lag:].size, RATE**2).pvalue for lag, both in later.items()),
        "rows": len(pairs) * min(stats.binomtest(int(n), STEPS, RATE**2).pvalue for n in (pairs.min(), pairs.max())),
    }


def shuffled_and_sliced(pass_length: int) -> Iterator[list[int]]:
    """What a shuffling loader does: every epoch a new order, cut into batches of one size."""
    generator = np.random.default_rng(0)
    batch = int(SIZE * RATE)
    while True:
        order = generator.permutation(SIZE)
        yield from order.reshape(-1, batch)[:pass_length].tolist()


def test_by_index_an_example_takes_part_like_a_bernoulli_draw_independent_of_all_others():
    found = membership(PoissonSampler(KEY, SIZE, RATE).draw(step) for step in range(STEPS))
    assert min(pvalues(found).values()) > FALSE_POSITIVE_RATE


def test_by_index_several_processes_together_draw_like_one():
    sampler = PoissonSampler(KEY, SIZE, RATE)
    found = membership(sum((sampler.share(step, rank, 3) for rank in range(3)), []) for step in range(STEPS))
    assert min(pvalues(found).values()) > FALSE_POSITIVE_RATE


def test_in_windows_a_row_takes_part_like_a_bernoulli_draw_independent_of_all_others(tmp_path):
    draws = windows(tmp_path, steps=125)
    found = membership(values(tmp_path, draws.share(step, 0, 1)) for step in range(STEPS))
    assert min(pvalues(found).values()) > FALSE_POSITIVE_RATE


def test_the_same_statistics_find_shuffle_and_slice():
    found = membership(members for _, members in zip(range(STEPS), shuffled_and_sliced(10), strict=False))
    caught = {name for name, pvalue in pvalues(found).items() if pvalue < FALSE_POSITIVE_RATE}
    assert {"batch size", "steps"} <= caught


def test_in_windows_several_processes_together_draw_like_one(tmp_path):
    draws, other = windows(tmp_path, steps=125), windows(tmp_path, steps=125, fill=None)

    def members(step: int) -> list[int]:
        mine, theirs = draws.share(step, 0, 2), other.share(step, 1, 2)
        assert not set(mine) & set(theirs) and len(mine) - len(theirs) in (0, 1)
        return values(tmp_path, mine + theirs)

    assert min(pvalues(membership(map(members, range(STEPS)))).values()) > FALSE_POSITIVE_RATE


@pytest.mark.parametrize("size", [SIZE, 9000])
@pytest.mark.parametrize("first", [0, 5])
def test_a_window_holds_the_draw_by_index(tmp_path, size, first):
    sampler = PoissonSampler(KEY, size, 0.01)
    draws = Windows(tmp_path, sampler, 7, 100, {"run": "r"}, Passes(stream(size)))
    for step in range(first, first + 20):
        assert values(tmp_path, draws.share(step, 0, 1)) == sampler.draw(step).tolist()


def test_one_pass_serves_a_window_and_the_last_one_ends_with_the_plan(tmp_path):
    passes = Passes(stream())
    draws = windows(tmp_path, steps=8, end=20, fill=passes)
    for step in range(20):
        draws.share(step, 0, 1)
    assert passes.count == 3
    assert shards.Progress.read(folder_of(tmp_path, 16)).identity["steps"] == 4


def test_windows_are_deleted_when_their_steps_have_been_taken(tmp_path):
    draws = windows(tmp_path, steps=4, end=12)
    for step in range(12):
        draws.share(step, 0, 1)
        draws.done_before(step)
        assert len(list(tmp_path.iterdir())) == 1
    draws.done_before(12)
    assert not list(tmp_path.iterdir())


def test_rows_drawn_for_no_step_of_the_window_are_not_kept(tmp_path):
    draws = windows(tmp_path, steps=2)
    drawn = set(values(tmp_path, draws.share(0, 0, 1))) | set(values(tmp_path, draws.share(1, 0, 1)))
    assert set(shards.open_rows(folder_of(tmp_path, 0))["value"]) == drawn
    assert 0 < len(drawn) < 80


def test_a_resumed_run_takes_up_the_window_without_a_pass_and_without_the_key(tmp_path):
    before = windows(tmp_path, steps=10)
    drawn = [values(tmp_path, before.share(step, 0, 1)) for step in range(10)]
    passes = Passes(stream())
    after = windows(tmp_path, sampler=PoissonSampler(new_key(), SIZE, RATE), steps=10, fill=passes)
    assert [values(tmp_path, after.share(step, 0, 1)) for step in range(4, 10)] == drawn[4:]
    assert passes.count == 0
    after.share(10, 0, 1)
    assert passes.count == 1


@pytest.mark.parametrize("other", [{"run": "another"}, {"sampler": PoissonSampler(KEY, SIZE, 0.2)}])
def test_the_window_of_another_run_or_rate_is_removed(tmp_path, other):
    windows(tmp_path, steps=10).share(0, 0, 1)
    passes = Passes(stream())
    windows(tmp_path, steps=5, fill=passes, **other).share(3, 0, 1)
    assert passes.count == 1
    assert [folder.name for folder in tmp_path.iterdir()] == [folder_of(tmp_path, 3).name]


def test_steps_skipped_by_a_resumed_run_need_no_window(tmp_path):
    passes = Passes(stream())
    loader = LogicalBatchLoader(LogicalBatchIndices(windows(tmp_path, fill=passes), 20, 0, 1), SIZE)
    indices = iter(loader.batch_sampler)
    for _ in range(10):
        next(indices)
    assert passes.count == 0
    list(next(indices))
    assert passes.count == 1 and folder_of(tmp_path, 10).is_dir()


def test_the_choice_does_not_depend_on_how_rows_arrive():
    sampler = PoissonSampler(KEY, 10_000, 0.01)

    def pairs(size: int) -> list[tuple[int, int]]:
        choice, found = WindowChoice(sampler, 3, 6), []
        for first in range(0, 10_000, size):
            kept, steps = choice.among(first, min(size, 10_000 - first))
            of_rows = zip(kept, steps.to_pylist(), strict=True)
            found += [(first + int(row), step) for row, some in of_rows for step in some]
        return found

    assert pairs(64) == pairs(1000) == pairs(10_000)
