"""Quality against time: points of a TOML file, taken from records; their table and picture."""

from __future__ import annotations

import importlib
import json

import pytest
from PIL import Image

from tiue_export.errors import UsageError
from tiue_export.proof.latency_record import (
    Environment,
    Measurement,
    Record,
    Settings,
    Turn,
    to_json,
)

against = importlib.import_module("tiue_export.benchmarks.studies.quality_against_time")

POINT = '[[points]]\nseries = "post hoc"\nlabel = "{}"\nscores = "quality.json"\n'


def contender(name, *unet_ms):
    turns = tuple(Turn(number, {"unet": (one,)}) for number, one in enumerate(unet_ms, start=1))
    return Measurement(name, name, "graph", {}, turns)


@pytest.fixture
def records(tmp_path):
    column = {"frechet": 11.4, "coverage": 0.6, "top1": 0.9}
    scores = [{"name": "student", **column}, {"name": "teacher", **column, "frechet": 8.1}]
    (tmp_path / "quality.json").write_text(json.dumps({"scores": scores}), "utf-8")
    rows = (contender("student/ort/fp32", 50.0, 70.0, 60.0), contender("fifty/ort/fp32", 1000.0))
    here = Environment("now", "1", "Linux", "3.11", "CPU", (), 2, None, 1, 1, (0.0,) * 3, {}, {})
    record = Record(here, Settings(3, 1, 0, True), (*rows, Measurement("broken", "", "graph", {})))
    (tmp_path / "latency.json").write_text(to_json(record, {}), "utf-8")
    return tmp_path


def points_file(records, *points, latency="latency.json"):
    file = records / "points.toml"
    file.write_text(f'latency = "{latency}"\n' + "\n".join(points), "utf-8")
    return file


STUDENT = POINT.format("K = 4") + 'scored = "student"\ntimed = "student/ort/fp32"\n'
TEACHER = POINT.format("4 steps") + 'scored = "teacher"\ntimed = "fifty/ort/fp32"\nshare = 0.08\n'


def test_a_point_has_its_scores_and_the_median_of_its_times_or_a_share_of_it(records):
    student, teacher = against.read_points(points_file(records, STUDENT, TEACHER))
    assert (student.label, student.unet_ms, student.scores["frechet"]) == ("K = 4", 60.0, 11.4)
    assert teacher.unet_ms == pytest.approx(80.0)
    assert teacher.scores == {"frechet": 8.1, "coverage": 0.6, "top1": 0.9}


def test_the_command_prints_a_table_and_draws_a_panel_for_each_measure(records, capsys):
    plot = records / "new" / "points.png"
    against.main([str(points_file(records, STUDENT, TEACHER)), "--plot", str(plot)])
    with Image.open(plot) as picture:
        assert picture.width > 2 * picture.height
    assert "| post hoc | K = 4 | 60.0 | 11.400 | 0.600 | 0.900 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("point", "said"),
    [
        (STUDENT.replace('"student"', '"pupil"'), "quality.json has no 'pupil'; it has student"),
        (STUDENT.replace("student/ort", "pupil/ort"), "latency record has no 'pupil/ort/fp32'"),
        (STUDENT.replace("student/ort/fp32", "broken"), "broken was not measured to the end"),
        (POINT.format("K = 4"), "a point lacks scored, timed"),
        ("", r"no \[\[points\]\]"),
    ],
)
def test_a_point_that_no_record_has_is_refused_by_name(records, point, said):
    with pytest.raises(UsageError, match=said):
        against.read_points(points_file(records, point))


def test_what_is_no_toml_is_refused(records):
    with pytest.raises(UsageError, match="cannot be read as points"):
        against.read_points(points_file(records, "[[points"))
