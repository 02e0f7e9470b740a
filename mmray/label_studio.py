"""Label Studio's files: tasks with what the model thinks, the form that people fill in, and their answers."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple
from xml.sax.saxutils import quoteattr

from mmray.errors import ConfigError, DataError
from mmray.schema import Label

FIELD = "labels"
"""What the form calls the choice of labels."""


class Question(NamedTuple):
    """A row that people are asked about."""

    file: str
    footer_sha256: str
    """Of the file: rows of another one of this name are other rows."""
    row: int
    caption: str
    image: bytes | None
    """JPEG."""
    labels: Sequence[Label]
    """What the model decided."""
    integers: bool
    """Whether the model's labels are integers."""
    certainty: float
    """0 to 1."""
    model: str


class Answer(NamedTuple):
    """What people say of a row."""

    file: str
    footer_sha256: str
    row: int
    labels: tuple[Label, ...]
    """Sorted."""
    integers: bool
    """Whether the model's labels are integers."""


def form(labels: Iterable[Label]) -> str:
    """Write the labeling interface: the image, the caption, and a choice of any number of labels.

    Raises:
        ConfigError: XML cannot hold a label.
    """
    labels = list(labels)
    for label in labels:
        if not str(label).isprintable():
            raise ConfigError(f"label {label!r} holds what cannot be shown as a choice; rename it")
    choices = "".join(f"    <Choice value={quoteattr(str(label))}/>\n" for label in labels)
    return (
        '<View>\n  <Image name="image" value="$image"/>\n  <Text name="caption" value="$caption"/>\n'
        f'  <Choices name="{FIELD}" toName="image" choice="multiple" showInline="true">\n{choices}'
        "  </Choices>\n</View>\n"
    )


def tasks(questions: Iterable[Question]) -> str:
    """Write questions as tasks to import, the model's labels as pre-annotations; images are in the file."""
    return json.dumps([_task(question) for question in questions], ensure_ascii=False, indent=1) + "\n"


def _task(question: Question) -> dict[str, Any]:
    image = ""
    if question.image is not None:
        image = "data:image/jpeg;base64," + base64.b64encode(question.image).decode()
    choice = {
        "from_name": FIELD,
        "to_name": "image",
        "type": "choices",
        "value": {"choices": [str(label) for label in question.labels]},
    }
    return {
        "data": {
            "image": image,
            "caption": question.caption,
            "file": question.file,
            "footer_sha256": question.footer_sha256,
            "row": question.row,
            "integers": question.integers,
        },
        "predictions": [
            {
                "model_version": question.model,
                "score": round(question.certainty, 6),
                "result": [choice] if question.labels else [],
            }
        ],
    }


def read_answers(text: str, source: str) -> list[Answer]:
    """Read an export of answers (JSON, not JSON-MIN): of each task the latest that was not cancelled.

    Tasks that nobody has answered are left out.

    Raises:
        DataError: it is no such export, or a task is none that `tasks` wrote; names the task.
    """
    try:
        exported = json.loads(text)
    except ValueError as error:
        raise DataError(f"{source} is not JSON ({error}); export the answers as JSON") from None
    if not isinstance(exported, list):
        raise DataError(f"{source} holds no list of tasks; export the answers as JSON")
    answers = []
    for number, task in enumerate(exported, 1):
        try:
            given = [each for each in task["annotations"] if not each.get("was_cancelled")]
            if given:
                answers.append(
                    _answer(task["data"], max(given, key=lambda each: each.get("updated_at") or ""))
                )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{source}: task {number} is none that export.py label-studio wrote, or was not exported as "
                f"JSON ({type(error).__name__}: {error})"
            ) from None
    return answers


def _answer(data: dict[str, Any], annotation: dict[str, Any]) -> Answer:
    integers = bool(data["integers"])
    chosen: set[Label] = {
        int(label) if integers else str(label)
        for result in annotation["result"]
        if result["from_name"] == FIELD
        for label in result["value"]["choices"]
    }
    place = (str(data["file"]), str(data["footer_sha256"]), int(data["row"]))
    return Answer(*place, tuple(sorted(chosen)), integers)
