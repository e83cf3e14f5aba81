"""The README's commands are the ones that are run."""

import re
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]


def fenced(marker: str) -> str:
    text = (ROOT / "README.md").read_text()
    found = re.search(rf"<!-- {marker} -->\n```bash\n(.*?)\n```\n<!-- end -->", text, re.S)
    assert found, f"README.md has no block {marker}"
    return found.group(1)


def test_readme_has_one_line_to_run_and_one_line_to_test():
    for marker in ("run-command", "test-command"):
        command = fenced(marker)
        assert "\n" not in command
        assert command.startswith("python3 -m venv .venv && .venv/bin/python -m pip install")


def test_ci_runs_the_command_of_the_readme():
    script = (ROOT / ".ci" / "run").read_text()
    assert "test-command" in script
    assert "pytest" not in script, "the command must come from the README, not from the script"
