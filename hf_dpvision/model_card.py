"""The model card: front matter and text rendered from the run's own privacy statement, no number typed by hand."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError

from .errors import ArgumentRefused
from .wording import is_protected, plain_sentences, rows, unit_of


CARD_NAME = "README.md"
_TEMPLATE = "model_card.md.jinja"
_BLOCKS = ("summary", "details")  # what the card says about privacy, each between a comment and the next
END_OF_BLOCK = "<!-- end -->"
PRIVACY_TAGS = ("differential-privacy", "dp-sgd")  # only where something is guaranteed
_TAGS = ("image-classification", "hf-dpvision", "generated_from_trainer")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")  # owner and name; a bare word could be any local folder


@dataclass(frozen=True)
class CardResult:
    """One measured value on held-out data.

    Args:
        model: which model, in words: `this model`, `before fine-tuning`, `without privacy`.
        metric: name of the metric, such as `accuracy`.
        value: between 0 and 1 for an accuracy.
        dataset: Hub id, or a name in words.
        part: name of the held-out part.
        released: whether this is the value of the model the card describes.
        protected: False for a model trained on the same images without privacy.
    """

    model: str
    metric: str
    value: float
    dataset: str
    part: str = "held-out"
    released: bool = False
    protected: bool = True

    @property
    def dataset_shown(self) -> str:
        """The data set's name without folders of this machine."""
        return _shown(self.dataset)


def render_model_card(
    statement: Mapping[str, Any],
    *,
    model_name: str,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    license: str | None = None,
    library_name: str = "transformers",
    results: Sequence[CardResult] = (),
    training: Mapping[str, object] | None = None,
    report: bool = False,
) -> str:
    """Return the card as Markdown with YAML front matter.

    Args:
        statement: what `trainer.privacy_statement()` returns; it becomes the key `differential_privacy` of the front
            matter, and is the source of every privacy number in the text.
        model_name: title, and name of the model in the usage example.
        base_model: the model that was fine-tuned, by default that of the statement. A Hub id enters the front matter;
            of a local path only the last component is shown.
        datasets: by default that of the statement. Hub ids enter the front matter; other names are shown in the text.
        license: identifier as the Hub knows it, such as `apache-2.0`.
        library_name: `transformers`, `timm` or `peft`.
        results: measured values; those marked `released` enter `model-index`.
        training: public hyper-parameters, shown as a table. Never pass losses, realised batch sizes or keys.
        report: whether `report.html` and `report.png` of this run lie beside the card.

    Raises:
        ArgumentRefused: the statement lacks a field that the card must state.
    """
    base_model = base_model or statement.get("base_model")
    datasets = datasets or [name for name in [statement.get("dataset")] if name]
    try:
        text = _environment().get_template(_TEMPLATE).render(
            model_name=_last_part(model_name),
            base_model=None if base_model is None else _shown(base_model),
            dataset=", ".join(_shown(name) for name in datasets),
            results=results,
            training=training or {},
            report=report,
            statement=statement,
            protected=is_protected(statement),
            **dict(zip(_BLOCKS, privacy_blocks(statement), strict=True)),
        )
    except (KeyError, UndefinedError) as error:
        raise ArgumentRefused(
            f"the privacy statement lacks a field that the card must state ({error}): pass what "
            "trainer.privacy_statement() returns, unchanged."
        ) from error
    front = _front_matter(statement, model_name, base_model, datasets, license, library_name, results)
    return f"---\n{front.to_yaml().strip()}\n---\n\n{text}"


def _front_matter(
    statement: Mapping[str, Any],
    model_name: str,
    base_model: str | None,
    datasets: Sequence[str],
    license: str | None,
    library_name: str,
    results: Sequence[CardResult],
) -> ModelCardData:
    return ModelCardData(
        model_name=_last_part(model_name),
        base_model=base_model if _is_hub_id(base_model) else None,
        datasets=[name for name in datasets if _is_hub_id(name)] or None,
        license=license,
        library_name=library_name,
        pipeline_tag="image-classification",
        tags=[*_TAGS, *(PRIVACY_TAGS if is_protected(statement) else ())],
        eval_results=[_eval_result(result) for result in results if result.released] or None,
        differential_privacy=dict(statement),
    )


def privacy_blocks(statement: Mapping[str, Any]) -> list[str]:
    """Return the parts of the card that speak of privacy, each between two comments by which it is found again.

    They depend on the statement alone, so that whoever has `privacy.json` can render and compare them.

    Raises:
        KeyError, UndefinedError: the statement lacks a field.
    """
    protected = is_protected(statement)
    contents = {
        "paragraphs": plain_sentences(statement),
        "rows": rows(statement) if protected else [],
        "covered": unit_of(statement).covered,
        "statement": statement,
        "protected": protected,
    }
    texts = {name: _environment().get_template(f"privacy_{name}.md.jinja").render(contents) for name in _BLOCKS}
    return [f"{block_marker(name)}\n{text.strip()}\n{END_OF_BLOCK}" for name, text in texts.items()]


def block_marker(name: str) -> str:
    """Return the comment with which a block starts: `summary` or `details`."""
    return f"<!-- privacy {name}: rendered from privacy.json and compared by hf-dpvision verify, do not edit -->"


def write_model_card(folder: str | Path, statement: Mapping[str, Any], **card: Any) -> Path:
    """Render the card into `folder/README.md` and return that path; keywords as for `render_model_card`."""
    path = Path(folder) / CARD_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_model_card(statement, **card), encoding="utf-8")
    return path


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("hf_dpvision", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, not HTML
    )
    environment.filters |= {"cell": _cell}
    return environment


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _is_hub_id(name: str | None) -> bool:
    return name is not None and _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def _shown(name: str) -> str:
    return name if _is_hub_id(name) else _last_part(name)


def _last_part(name: str) -> str:
    """Drop the folders of a local path: they say something about a machine and nothing about the model."""
    return Path(name).name or name


def _eval_result(result: CardResult) -> EvalResult:
    return EvalResult(
        task_type="image-classification",
        dataset_type=result.dataset if _is_hub_id(result.dataset) else "local",
        dataset_name=_shown(result.dataset),
        dataset_split=result.part,
        metric_type=result.metric,
        metric_value=result.value,
    )
