"""Records survive the process that wrote them, whole or not at all."""

import json

import pytest

from captum_lnstat.evaluation.records import Records, ResumeError, check_manifest


def test_a_torn_line_is_left_out(tmp_path):
    records = Records(tmp_path)
    records.append([{"index": 4, "value": 0.25}, {"index": 1}])
    (file,) = tmp_path.glob("*.jsonl")
    whole = file.read_bytes()
    for cut in range(len(whole) + 1):
        file.write_bytes(whole[:cut])
        assert len(records.read()) == whole[:cut].count(b"\n")
    # A process that goes on writes a file of its own, so nothing is ever put behind a torn line.
    file.write_bytes(whole[:-3])
    Records(tmp_path).append([{"index": 1}])
    assert [record["index"] for record in records.read()] == [1, 4]


def test_no_record_counts_twice(tmp_path):
    for _ in range(3):
        Records(tmp_path).append([{"index": 0}, {"index": 7}])
    assert [record["index"] for record in Records(tmp_path).read()] == [0, 7]


def test_the_first_record_of_an_image_counts(tmp_path):
    records = Records(tmp_path)
    records.append([{"index": 0, "value": 1}])
    records.append([{"index": 0, "value": 2}])
    assert [record["value"] for record in records.read()] == [1]


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"index": 1}\n{"index":\n{"index": 2}\n')
    with pytest.raises(ResumeError, match=r"line 2 of .*a\.jsonl"):
        Records(tmp_path).read()
    (tmp_path / "a.jsonl").write_text("[1]\n")
    with pytest.raises(ResumeError, match="line 1"):
        Records(tmp_path).read()


def test_nothing_but_numbers_is_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        Records(tmp_path).append([{"index": 0, "value": float("nan")}])
    assert Records(tmp_path).read() == []


def test_other_settings_are_refused_by_name(tmp_path):
    settings = {"seed": 0, "methods": "a,b", "frame": {"size": (8, 8)}}
    assert check_manifest(tmp_path / "run", settings, write=True) is False
    assert check_manifest(tmp_path / "run", settings, write=True) is True
    with pytest.raises(ResumeError, match='methods was "a,b" and is "a"') as error:
        check_manifest(tmp_path / "run", {**settings, "methods": "a"}, write=True)
    assert "seed" not in str(error.value)
    with pytest.raises(ResumeError, match=r"frame was .*8, 8.* and is .*8, 9"):
        check_manifest(tmp_path / "run", {**settings, "frame": {"size": [8, 9]}}, write=True)
    with pytest.raises(ResumeError, match="more was null and is 1"):
        check_manifest(tmp_path / "run", {**settings, "more": 1}, write=True)
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["methods"] == "a,b"


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ResumeError, match="not empty"):
        check_manifest(tmp_path, {}, write=True)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]
