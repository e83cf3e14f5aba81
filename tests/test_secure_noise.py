"""Noise from the cryptographic generator: its distribution, its keystream, and what is said of it."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from trainer_cases import Linear, arguments, trainer

from hf_dpvision import secure_noise
from hf_dpvision.errors import ArgumentRefused
from hf_dpvision.mechanism import SystemRandomness
from hf_dpvision.noise import add_noise
from hf_dpvision.secure_noise import SecureNoiseSource
from hf_dpvision.verify import verify_folder


FALSE_POSITIVE_RATE = 1e-6  # of each test with another key; the key is fixed, so that none fails by chance
KEY = bytes(range(32))


@pytest.fixture(autouse=True)
def needs_cryptography() -> None:
    pytest.importorskip("cryptography", reason="cryptography is not installed (extra `secure`)")


def test_draws_are_gaussian_of_the_stated_standard_deviation() -> None:
    draws = SecureNoiseSource(key=KEY).normal((400_000,), 3.0).double() / 3.0
    squares = float(draws.square().sum())
    assert 2 * min(stats.chi2.cdf(squares, len(draws)), stats.chi2.sf(squares, len(draws))) > FALSE_POSITIVE_RATE
    assert abs(float(draws.mean())) * len(draws) ** 0.5 < stats.norm.isf(FALSE_POSITIVE_RATE / 2)
    assert stats.kstest(draws.numpy(), "norm").pvalue > FALSE_POSITIVE_RATE


def test_the_two_draws_of_a_pair_and_neighbours_are_independent() -> None:
    draws = SecureNoiseSource(key=KEY).normal((200_000,), 1.0).double()
    for one, other in ((draws[:100_000], draws[100_000:]), (draws[:-1], draws[1:])):
        for left, right in ((one, other), (one.square(), other.square())):
            correlation = float(torch.corrcoef(torch.stack((left, right)))[0, 1])
            assert abs(correlation) * len(left) ** 0.5 < stats.norm.isf(FALSE_POSITIVE_RATE / 2)


def test_noise_two_percent_too_small_would_be_seen() -> None:
    squares = float((SecureNoiseSource(key=KEY).normal((400_000,), 0.98)).double().square().sum())
    assert stats.chi2.cdf(squares, 400_000) < FALSE_POSITIVE_RATE


def test_draws_are_the_transform_of_the_keystream_word_by_word() -> None:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    stream = Cipher(algorithms.AES256(KEY), modes.CTR(bytes(16))).encryptor().update(bytes(48))
    words = [int.from_bytes(stream[8 * i : 8 * i + 8], "little") >> 11 for i in range(6)]
    expected = []
    for wave in (math.cos, math.sin):
        for first, second in zip(words[:3], words[3:], strict=True):
            radius = math.sqrt(-2 * math.log((first + 1) / 2**53))
            expected.append(2.0 * radius * wave(2 * math.pi * second / 2**53))
    draws = SecureNoiseSource(key=KEY).normal((5,), 2.0)  # the last one of three pairs is thrown away
    np.testing.assert_allclose(draws.numpy(), expected[:5], rtol=1e-6)


def test_no_draw_returns_whatever_the_shapes_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secure_noise, "_CHUNK", 8)
    source = SecureNoiseSource(key=KEY)
    draws = [source.normal(shape, 1.0) for shape in ((), (1,), (0,), (3, 5), (100,), (17,))]
    assert [tuple(draw.shape) for draw in draws] == [(), (1,), (0,), (3, 5), (100,), (17,)]
    values = torch.cat([draw.flatten() for draw in draws])
    assert len(values.unique()) == len(values) == 134
    assert torch.isfinite(values).all()


def test_two_sources_and_two_parameters_share_no_noise() -> None:
    sums = {"a": torch.zeros(50), "b": torch.zeros(50)}
    values = torch.cat([add_noise(sums, 1.0, SecureNoiseSource())[name] for _ in range(2) for name in sums])
    assert len(values.unique()) == 200


@pytest.mark.parametrize("save", [pickle.dumps, copy.copy, copy.deepcopy])
def test_the_source_cannot_be_saved_or_copied(save) -> None:
    with pytest.raises(TypeError, match="repeats its noise"):
        save(SecureNoiseSource())


def test_a_run_says_which_generator_it_used_and_verifies(tmp_path: Path) -> None:
    run = trainer(tmp_path, Linear(), seed=None, secure_noise=True)
    run.train()
    run.save_model()
    run.create_model_card()
    noise = run.privacy_statement()["noise"]
    assert (noise["rng"], noise["cryptographic"]) == ("os-entropy-seeded-aes256ctr", True)
    assert noise["floating_point_protection"] == "none"
    result = verify_folder(tmp_path, ["prv"])
    assert not [finding for finding in result.findings if "noise" in finding.field]
    statement = tmp_path / "privacy.json"
    statement.write_text(statement.read_text().replace('"cryptographic": true', '"cryptographic": false'))
    assert "noise.cryptographic" in [finding.field for finding in verify_folder(tmp_path, ["prv"]).findings]


def test_by_default_the_generator_is_none(tmp_path: Path) -> None:
    noise = trainer(tmp_path, Linear(), seed=None).privacy_statement()["noise"]
    assert (noise["rng"], noise["cryptographic"]) == ("os-entropy-seeded-mt19937", False)
    assert isinstance(SystemRandomness(secure_noise=True).noise_source(torch.device("cpu"))(1), SecureNoiseSource)


def test_without_cryptography_it_is_refused_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secure_noise.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ArgumentRefused, match=r"hf_dpvision\[secure\]"):
        arguments(tmp_path, secure_noise=True)
    with pytest.raises(ArgumentRefused, match=r"hf_dpvision\[secure\]"):
        SecureNoiseSource()
