"""Label Studio's files: what is asked, and what is answered."""

import base64
import json
from xml.etree import ElementTree

import pytest

from mmray.errors import ConfigError, DataError
from mmray.label_studio import Answer, Question, form, read_answers, tasks


def ask(row, labels=("dog",), integers=False):
    return Question("a.parquet", "5ab", row, "Two <dogs>", b"\xff\xd8", labels, integers, 0.25, "f00")


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
        "footer_sha256": "5ab",
        "row": 7,
        "integers": False,
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
        Answer("a.parquet", "5ab", 0, ("bus", "cat"), False),
        Answer("a.parquet", "5ab", 1, (), False),
    ]


def test_integers_stay_integers_and_digits_that_are_text_stay_text():
    exported = [answered(ask(0, integers=True), ("10", "9")), answered(ask(1), ("10", "9"))]
    assert [answer.labels for answer in read_answers(json.dumps(exported), "x.json")] == [
        (9, 10),
        ("10", "9"),
    ]


def test_a_label_that_no_form_can_show_is_refused():
    with pytest.raises(ConfigError, match="rename it"):
        form(["fine", "bell \x07"])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "x.json is not JSON"),
        ('{"tasks": []}', "holds no list of tasks"),
        ('[{"id": 3}]', "task 1 is none"),
        (json.dumps([answered(ask(0), ("dog",)) | {"data": {"row": 3}}]), "KeyError: 'integers'"),
        (json.dumps([answered(ask(0), ("dog",)) | {"annotations": "x"}]), "AttributeError"),
    ],
)
def test_what_is_no_export_of_answers_is_refused(text, told):
    with pytest.raises(DataError, match=told):
        read_answers(text, "x.json")
