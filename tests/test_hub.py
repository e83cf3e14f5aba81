"""What is uploaded holds no secret, byte by byte, and loads back as the model that was trained."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import re
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hub_server import Hub, running_hub

from hf_dpvision import plots
from hf_dpvision.report import PRIVATE_FILES, RELEASED_FILES


pytest.importorskip("peft")

TESTS = Path(__file__).parent
TOKEN = "hf_planted" + "Q7x" * 9
USER = "planteduser"
USEFUL = {".gitattributes", "README.md", "privacy.json", "privacy/ledger.jsonl", "preprocessor_config.json"}
MODEL = USEFUL | {"config.json", "model.safetensors"}
ADAPTER = USEFUL | {"adapter_config.json", "adapter_model.safetensors"}


@dataclass(frozen=True)
class Pushed:
    """What the pushing and the loading process left behind."""

    hub: Hub
    folder: Path
    told: dict[str, Any]
    loaded: dict[str, Any]


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pushed]:
    """Train and push in one process, load back in another one with an empty cache."""
    folder = tmp_path_factory.mktemp("planted-folder")
    with running_hub(TOKEN) as hub:
        for what in ("push", "load"):
            environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"} | {
                "HF_ENDPOINT": hub.endpoint,
                "HF_TOKEN": TOKEN,
                "HF_HOME": str(folder / f"{what}-home"),
                "HF_HUB_DISABLE_XET": "1",
                "NO_PROXY": "127.0.0.1",
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "OMP_NUM_THREADS": "1",
                "LOGNAME": USER,
                "USER": USER,
                "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]),
            }
            command = [sys.executable, str(TESTS / "pushing_run.py"), what, str(folder), TOKEN]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr[-4000:]
        told, loaded = (json.loads((folder / f"{what}.json").read_text()) for what in ("push", "load"))
        yield Pushed(hub, folder, told, loaded)


def opened(content: bytes) -> Iterator[bytes]:
    """The bytes, and those of everything packed inside them."""
    yield content
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for name in archive.namelist():
                yield from opened(archive.read(name))


def uploaded(hub: Hub, repos: Iterable[str]) -> bytes:
    """Everything sent about some repositories, also in the clear where it was packed or sent in base64."""
    found: list[bytes] = []
    names = tuple(repos)
    for name in names:
        for commit in hub.repos[name]:
            found += [commit.message.encode(), *(path.encode() for path in commit.files)]
            found += [part for content in commit.files.values() for part in opened(content)]
    for request in hub.requests:
        if any(name in request.path or name.split("/")[1].encode() in request.body for name in names):
            found += [request.path.encode(), request.headers.encode(), request.body]
            if "/preupload/" in request.path:
                found += [base64.b64decode(file["sample"]) for file in json.loads(request.body)["files"]]
    return b"\n".join(found)


def of_number(value: float) -> list[bytes]:
    """A number as text of six digits and more, and as a binary float of eight bytes."""
    texts = repr(value), f"{value:.6f}", f"{value:.8g}", f"{np.float32(value):.7g}"
    return [text.encode() for text in texts] + [np.float64(value).tobytes()]


def train_losses(run: dict[str, Any]) -> list[bytes]:
    """What a Trainer would have logged, and the losses of single examples, two at a time to be long enough."""
    steps = [float(np.mean(losses)) for losses in run["losses"] if losses]
    forms = [form for value in [*steps, float(np.mean(steps))] for form in of_number(value)]
    forms.append(np.float32(np.mean(steps)).tobytes())
    for losses in run["losses"]:
        for pair in zip(losses, losses[1:], strict=False):
            forms += [np.array(pair, dtype).tobytes() for dtype in (np.float32, np.float64)]
    return forms


def secrets(pushed: Pushed) -> dict[str, list[bytes]]:
    """By kind, all byte strings that must not have been uploaded."""
    from pushing_run import PATTERN, PIXELS

    runs = [value for value in pushed.told.values() if isinstance(value, dict)]
    keys = [bytes.fromhex(key) for key in pushed.told["keys"]]
    states = [bytes.fromhex(state) for run in runs for states in run["states"] for state in states]
    pixels = [PIXELS.astype(dtype).tobytes() for dtype in (np.float16, np.float32, np.float64)]
    host = socket.gethostname()
    return {
        "token": [TOKEN.encode(), base64.b64encode(TOKEN.encode())],
        "pixels": [PATTERN.tobytes(), PATTERN.tobytes().hex().encode(), *pixels],
        "train loss": [form for run in runs for form in train_losses(run)],
        "state": states,
        "key": [form for key in keys for form in (key, key.hex().encode(), base64.b64encode(key))],
        "machine": [str(pushed.folder).encode(), USER.encode()] + [host.encode()] * (len(host) > 7),
    }


def kinds_found(content: bytes, wanted: dict[str, list[bytes]]) -> set[str]:
    """Which kinds of secrets stand somewhere in the bytes."""
    return {kind for kind, forms in wanted.items() if any(form in content for form in forms)}


def test_no_uploaded_byte_is_secret(pushed):
    # text and binary forms are so long that noise hits one of them by chance once in more than 10,000 runs
    ours = [name for name in pushed.hub.repos if name != "tester/control"]
    content = uploaded(pushed.hub, ours)
    assert len(content) > 1_000_000 and b"dp-sgd" in content
    assert kinds_found(content, secrets(pushed)) == set()
    for word in (b'"loss"', b"train_loss", b"hub_token", b"checkpoint-", b"predictions", b"optimizer.pt"):
        assert word not in content


def test_what_looks_for_secrets_finds_them_where_they_are(pushed):
    wanted = secrets(pushed)
    assert all(len(forms) >= 2 for forms in wanted.values()) and len(wanted["train loss"]) > 50
    assert kinds_found(uploaded(pushed.hub, ["tester/control"]), wanted) == set(wanted)
    local = b"".join(part for file in (pushed.folder / "every").rglob("*.pth") for part in opened(file.read_bytes()))
    assert "state" in kinds_found(local, wanted)
    assert b"planted" in next(part for part in opened(pickle.dumps("planted")))


@pytest.mark.parametrize("name", ["timm", "peft"])
def test_no_file_at_all_holds_more_than_states_and_paths(pushed, name):
    files = [path for path in (pushed.folder / name).rglob("*") if path.is_file()]
    content = b"".join(part for path in files for part in opened(path.read_bytes()))
    assert len(files) > 8
    assert kinds_found(content, secrets(pushed)) == {"state", "machine"}  # in rng_state.pth and training_args.bin


def test_exactly_the_files_that_are_needed_are_uploaded(pushed):
    timm = MODEL - {"preprocessor_config.json"}
    reported = MODEL | (set(RELEASED_FILES) if plots.available() else set())  # of the last step
    wanted = {"every": reported, "end": reported | {"LICENSE"}, "timm": timm, "peft": ADAPTER}
    assert {name: set(pushed.hub.files(f"tester/{name}")) for name in wanted} == wanted
    left = {path.name for path in (pushed.folder / "end").iterdir()}
    assert {"predictions.csv", "rng_state.pth", "training_args.bin", "trainer_state.json", "eval_results.json"} <= left
    assert not any(name.startswith("_push") for name in left)
    assert (set(PRIVATE_FILES) <= left) == plots.available()
    assert RELEASED_FILES[0] not in pushed.hub.repos["tester/timm"][1].files


def test_weights_and_their_statement_come_in_one_commit(pushed):
    for name in ("every", "end", "timm"):
        for commit in pushed.hub.repos[f"tester/{name}"][1:]:
            said = json.loads(commit.files["privacy.json"])
            records = [json.loads(line) for line in commit.files["privacy/ledger.jsonl"].splitlines()]
            assert said["ledger"]["records"] == len(records) and said["ledger"]["chain"] == records[-1]["chain"]
            front = yaml.safe_load(commit.files["README.md"].decode().split("---\n")[1])
            assert front["differential_privacy"]["steps"] == said["steps"] == len(records) - 2
            assert front["differential_privacy"]["guarantee"] == said["guarantee"]
    steps = [json.loads(commit.files["privacy.json"])["steps"] for commit in pushed.hub.repos["tester/every"][1:]]
    assert steps[-1] == 4 and set(steps) <= {2, 4}  # a push that is still going on lets the next one fall out


def test_commit_messages_hold_no_number_but_the_step(pushed):
    ours = [f"tester/{name}" for name in ("every", "end", "timm", "peft")]
    allowed = r"initial commit|End of training|Training in progress, step [24]"
    assert all(re.fullmatch(allowed, commit.message.strip()) for name in ours for commit in pushed.hub.repos[name])


def test_metrics_are_on_the_card_if_the_data_is_public_and_only_then(pushed):
    public, private = (pushed.hub.files(f"tester/{name}")["README.md"].decode() for name in ("every", "end"))
    measured = [logs["eval_loss"] for logs in pushed.told["every"]["log"] if "eval_loss" in logs]
    result = yaml.safe_load(public.split("---\n")[1])["model-index"][0]["results"][0]
    assert result["metrics"] == [{"type": "loss", "value": measured[-1]}]
    assert f"| {measured[-1]:.4f} |" in public and "measured on public data" in public
    assert "model-index" not in private and "Metrics are withheld" in private
    logged = next(logs for logs in pushed.told["end"]["log"] if "eval_loss" in logs)
    assert logged["eval_metrics_are_private"] is True
    assert not any(form in uploaded(pushed.hub, ["tester/end"]) for form in of_number(logged["eval_loss"]))
    kept = json.loads((pushed.folder / "end" / "eval_results.json").read_text())
    assert kept["eval_metrics_are_private"] is True and kept["eval_loss"] == logged["eval_loss"]


@pytest.mark.parametrize("name", ["every", "end", "peft", "timm"])
def test_what_was_pushed_loads_back_with_equal_logits(pushed, name):
    trained = np.load(pushed.folder / f"{name}.npy")
    assert trained.std() > 0.01
    assert np.array_equal(np.load(pushed.folder / f"{name}-back.npy"), trained)
    if name == "timm":
        assert np.array_equal(np.load(pushed.folder / "timm-timm.npy"), trained)


@pytest.mark.parametrize("name", ["every", "end", "timm"])
def test_the_pipeline_works_by_the_name_of_the_repository(pushed, name):
    said = {row["label"]: row["score"] for row in pushed.loaded[name]}
    by_hand = pushed.loaded[f"{name} by hand"]
    assert [said[f"LABEL_{index}"] for index in range(3)] == pytest.approx(by_hand, abs=1e-6)
