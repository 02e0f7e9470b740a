"""Label Studio's files: what is asked, and what is answered."""

import base64
import json
from xml.etree import ElementTree

import pytest

from mmray.errors import DataError
from mmray.label_studio import Answer, Question, form, read_answers, tasks


def ask(row, labels=("dog",)):
    return Question("a.parquet", row, "Two <dogs>", b"\xff\xd8", labels, 0.25, "f00")


def answered(question, *choices, **more):
    """Give the task as Label Studio exports it once people have answered."""
    (task,) = json.loads(tasks([question]))
    result = [
        {"from_name": "labels", "to_name": "image", "type": "choices", "value": {"choices": [*each]}}
        for each in choices
    ]
    return task | {
        "annotations": [
            {"result": [one], "updated_at": f"2026-01-0{day}", **more} for day, one in enumerate(result, 1)
        ]
    }


def test_a_task_shows_the_row_and_what_the_model_thinks():
    (task,) = json.loads(tasks([ask(7, ("dog", "bus"))]))
    assert task["data"] | {"image": ""} == {
        "image": "",
        "caption": "Two <dogs>",
        "file": "a.parquet",
        "row": 7,
    }
    kind, _, data = task["data"]["image"].partition(",")
    assert (kind, base64.b64decode(data)) == ("data:image/jpeg;base64", b"\xff\xd8")
    (prediction,) = task["predictions"]
    assert prediction["model_version"] == "f00"
    assert prediction["result"][0]["value"]["choices"] == ["dog", "bus"]


def test_the_form_asks_for_any_number_of_labels_and_is_what_tasks_refer_to():
    root = ElementTree.fromstring(form(["stop sign", 'a "b" & <c>', 3]))
    choices = root.find("Choices")
    assert [choice.get("value") for choice in choices] == ["stop sign", 'a "b" & <c>', "3"]
    assert choices.get("choice") == "multiple"
    (result,) = json.loads(tasks([ask(0)]))[0]["predictions"][0]["result"]
    names = {element.get("name"): element for element in root}
    assert names[result["from_name"]].get("toName") == result["to_name"]
    assert {element.get("value") for element in root} == {"$image", "$caption", None}


def test_of_several_answers_the_latest_counts_and_of_none_there_is_no_row():
    exported = [
        answered(ask(0), ("dog",), ("cat", "bus", "cat")),
        answered(ask(1), ()),
        answered(ask(2)),
        answered(ask(3), ("dog",), was_cancelled=True),
    ]
    assert read_answers(json.dumps(exported), "x.json") == [
        Answer("a.parquet", 0, ("bus", "cat")),
        Answer("a.parquet", 1, ()),
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "x.json is not JSON"),
        ('{"tasks": []}', "holds no list of tasks"),
        ('[{"id": 3}]', "task 1 is none"),
        (json.dumps([answered(ask(0), ("dog",)) | {"data": {"row": 3}}]), "KeyError: 'file'"),
        (json.dumps([answered(ask(0), ("dog",)) | {"annotations": "x"}]), "AttributeError"),
    ],
)
def test_what_is_no_export_of_answers_is_refused(text, told):
    with pytest.raises(DataError, match=told):
        read_answers(text, "x.json")
