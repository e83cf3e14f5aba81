"""What may leave: the list of files that a released folder or repository may hold, each with the reason.

The list allows, it does not forbid: a file that no line names stays on this machine, whatever it is. Those named
follow from the noisy gradients and from public settings. What stays, therefore: logs and the trainer's state
(evaluation on private data, times), states of random number generators, pickles (`training_args.bin`, `optimizer.pt`:
paths of this machine, and code that runs when they are opened), event files, predictions, and whatever else is there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .accounting.journal import FILE, FOLDER


@dataclass(frozen=True)
class _Line:
    """One line of a list of files.

    Args:
        pattern: matches a whole path relative to the folder, with forward slashes.
        why: the files may leave, or stay.
    """

    pattern: str
    why: str


_TERMS = _Line(r"(LICENSE|NOTICE)(\.md|\.txt)?", "terms of use, the only files that the user may add")

_ALLOWED = (
    _Line(r"README\.md", "the card, written from privacy.json"),
    _Line(r"privacy\.json", "the statement; nothing in it depends on who was sampled"),
    _Line(re.escape(f"{FOLDER}/{FILE}"), "the charged steps, to compare with the statement; no key and no batch size"),
    _Line(r"config\.json", "the architecture and the names of the classes, which are public"),
    _Line(r"model(-\d{5}-of-\d{5})?\.safetensors", "weights, which the guarantee covers; holds tensors alone"),
    _Line(r"model\.safetensors\.index\.json", "which file holds which weight"),
    _Line(r"adapter_model\.safetensors", "weights of a PEFT adapter, which the guarantee covers"),
    _Line(r"adapter_config\.json", "the kind of adapter and the name of its base model"),
    _Line(r"(pre)?processor_config\.json", "how pictures are prepared; from the pretrained model, not from the data"),
    _Line(r"report\.(html|png)", "drawn from noisy gradients, the ledger, public settings and public metrics alone"),
    _TERMS,
    _Line(r"\.gitattributes", "written by the Hub itself"),
)

# What a Trainer writes beside a model. It stays, and nobody needs to hear of it at every push.
_STAYING = (
    _Line(r"checkpoint-\d+/.*|_.*|\.[^/]*/.*", "for this machine: optimizer, log and random number generators"),
    _Line(r"training_args\.bin|(optimizer|scheduler|scaler)\.pt|rng_state(_\d+)?\.pth", "pickles, of use here only"),
    _Line(r"trainer_state\.json|[^/]*_results\.json", "metrics, times"),
    _Line(r"search\.json", "the record of a search over settings, with its scores"),
    _Line(r"report-private\.(html|png)", "a report with metrics on private data, or of a run without privacy"),
    _Line(r"runs/.*|(.*/)?events\.out\.tfevents\..*", "event files, with times and metrics"),
    _Line(rf"{FOLDER}/.*", "the lock of the ledger"),
)


def released_files(folder: Path) -> list[str]:
    """Return the files that may be uploaded, relative to `folder`, sorted."""
    return [path for path in _files(folder) if _is_named(path, _ALLOWED)]


def forbidden_files(folder: Path) -> list[str]:
    """Return the files that may not be in a released folder, relative to it, sorted; [] if there are none.

    The output folder of a run always has some: its checkpoints, its log. They are not uploaded.

    Args:
        folder: of a released model, such as a clone or a download of a repository. What git and the Hub's client keep
            in `.git` and `.cache` is no part of it.
    """
    return [path for path in _files(folder) if not _is_named(path, _ALLOWED)]


def unexpected_files(folder: Path) -> list[str]:
    """Return those forbidden files of an output folder that no `Trainer` left there: somebody's notes, for example."""
    return [path for path in forbidden_files(folder) if not _is_named(path, _STAYING)]


def is_terms_of_use(path: str) -> bool:
    """Whether a released file is the user's own: a licence, say, put into the output folder."""
    return _is_named(path, [_TERMS])


def _is_named(path: str, lines: Sequence[_Line]) -> bool:
    return any(re.fullmatch(line.pattern, path) for line in lines)


def _files(folder: Path) -> list[str]:
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in paths if path.parts[0] not in (".git", ".cache"))
