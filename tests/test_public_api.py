"""The public surface changes only on purpose."""

import json
from pathlib import Path

from public_api import current


COMMITTED = Path(__file__).parent / "public_api.json"
WRITE = (
    "the public surface differs from tests/public_api.json. If that is meant: `make api`, an entry in CHANGELOG.md, "
    "and for what is removed or renamed the deprecation of CONTRIBUTING.md."
)


def test_names_signatures_and_defaults_are_the_committed_ones():
    committed, now = json.loads(COMMITTED.read_text()), json.loads(json.dumps(current()))
    parts = committed.keys() | now.keys()
    changed = {
        part: sorted(
            name
            for name in committed.get(part, {}).keys() | now.get(part, {}).keys()
            if committed.get(part, {}).get(name) != now.get(part, {}).get(name)
        )
        for part in parts
    }
    changed = {part: names for part, names in changed.items() if names}
    assert not changed, f"{changed}: {WRITE}"


def test_a_changed_default_would_be_seen():
    surface = current()
    assert surface["DPTrainingArguments"]["clipping"] == "'flat'"
    assert "output_dir" not in surface["DPTrainingArguments"], "what TrainingArguments has as well is not ours to keep"
    assert "train" in surface["DPTrainer"]
    assert surface["DPTrainer"]["epsilon"].endswith(", new")
    assert "--delta" in surface["commands"]["epsilon"]
    assert "ValueError" in surface["errors"]["RefusedError"]
