"""What may leave: the files that a released folder may hold."""

from __future__ import annotations

from pathlib import Path


ALLOWED = (
    "README.md",
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "preprocessor_config.json",
    "adapter_config.json",
    "privacy.json",
    "eval_results.json",
    ".gitattributes",
)


def forbidden_files(folder: Path) -> list[str]:
    """Return the files that may not be in a released folder, relative to it, sorted; [] if there are none."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [path.relative_to(folder).as_posix() for path in files if not any(path.match(name) for name in ALLOWED)]
