"""From hand-made records to the summary and the table."""

import numpy as np
import pytest

from captum_lnstat.evaluation.figure import draw
from captum_lnstat.evaluation.question import Quantity
from captum_lnstat.evaluation.summary import summarize, table

UP, DOWN = Quantity("up", True, (("up", None),)), Quantity("down", False, (("down", None),))


def record(index, group=None, only_two=False, target=1, **methods):
    return {
        "index": index, "name": f"{group or index}#{index}", "group": str(group or index), "target": target,
        "predicted": 1, "only_two": only_two, "methods": methods,
    }  # fmt: skip


def entries(summary, method):
    return summary["methods"][method]["metrics"]


def test_methods_are_compared_where_both_have_a_value():
    records = [record(i, a={"up": 1.0}, b={"up": 0.5} if i < 6 else {"failed": "why"}) for i in range(8)]
    records += [record(8, a={"up": 9.0}, b={"failed": "why"}), record(9, a={}, b={"up": 4.0})]
    summary = summarize(records, ["a", "b"], [UP], 0)
    assert entries(summary, "a")["up"]["value"] == pytest.approx(17 / 9)
    found = entries(summary, "b")["up"]
    assert (found["n"], found["value"], found["difference"]) == (7, 1.0, -0.5)
    assert found["difference_interval"] == [-0.5, -0.5]
    assert [one["name"] for one in summary["methods"]["b"]["failed"]] == ["6#6", "7#7", "8#8"]
    assert "difference" not in entries(summary, "a")["up"]


def test_questions_about_one_image_are_resampled_together():
    values = np.random.default_rng(0).normal(size=40)
    apart = summarize([record(i, a={"up": values[i // 5]}) for i in range(200)], ["a"], [UP], 0)
    together = summarize([record(i, group=f"g{i // 5}", a={"up": values[i // 5]}) for i in range(200)], ["a"], [UP], 0)
    assert (together["questions"], together["images"]) == (200, 40)
    wide, narrow = (np.ptp(entries(one, "a")["up"]["interval"]) for one in (together, apart))
    assert wide == pytest.approx(narrow * 5**0.5, rel=0.15)


def test_the_order_of_records_does_not_matter():
    records = [record(i, a={"up": float(i)}, b={"up": float(i % 3)}) for i in range(12)]
    assert summarize(records, ["a", "b"], [UP], 3) == summarize(records[::-1], ["a", "b"], [UP], 3)


def test_accuracy_is_of_images_with_one_object():
    records = [record(0, a={}), record(1, a={}, target=2), record(2, a={}, target=2, only_two=True)]
    assert summarize(records, ["a"], [UP], 0)["accuracy"] == 0.5
    assert summarize([record(0, target=None, a={})], ["a"], [UP], 0)["accuracy"] is None


def test_broken_samples_are_listed_and_nothing_else():
    broken = {"index": 1, "name": "b", "group": "b", "broken": "no file"}
    summary = summarize([record(0, a={"up": 1.0}), broken], ["a"], [UP, DOWN], 0)
    assert summary["broken"] == [{"name": "b", "reason": "no file"}]
    assert summary["questions"] == entries(summary, "a")["up"]["n"] == 1
    assert "down" not in entries(summary, "a")


def test_the_table_marks_what_is_sure_in_the_right_direction():
    rng = np.random.default_rng(0)
    records = [
        record(i, first={"up": 0.5, "down": 0.5}, worse={"up": 0.4, "down": 0.6}, better={"up": 0.6, "down": 0.4},
               same={"up": 0.5 + rng.normal(0, 0.1), "down": 0.5})
        for i in range(30)
    ]  # fmt: skip
    summary = summarize(records, ["first", "worse", "better", "same"], [UP, DOWN], 0)
    lines = {
        line.split("|")[1].strip(): line for line in table(summary, "a title").splitlines() if line.startswith("| ")
    }
    assert lines["method"].split("|")[2:4] == [" up ↑ ", " down ↓ "]
    assert lines["first"] == "| first | 0.500 [0.500, 0.500] | 0.500 [0.500, 0.500] |"
    assert lines["worse"] == "| worse | 0.400 [0.400, 0.400] - | 0.600 [0.600, 0.600] - |"
    assert lines["better"] == "| better | 0.600 [0.600, 0.600] + | 0.400 [0.400, 0.400] + |"
    assert not lines["same"].rstrip(" |").endswith(("+", "-"))
    assert lines["*n*"] == "| *n* | 30 | 30 |"


def test_the_figure_shows_every_number():
    records = [record(i, a={"up": float(i % 2)}, b={"up": 1.0, "down": float(i % 3)}) for i in range(9)]
    summary = summarize(records, ["a", "b"], [UP, DOWN], 0)
    panels = draw(summary, "costs $5 or $6").axes
    assert [panel.get_title(loc="left") for panel in panels] == ["up", "down"]
    points = [
        [tuple(float(v[0]) for v in line.get_data()) for line in p.lines if len(line.get_xdata()) == 1] for p in panels
    ]
    assert points == [[(pytest.approx(4 / 9), 0.0), (1.0, 1.0)], [(1.0, 1.0)]]


def test_a_few_values_are_said_to_be_few_and_get_no_interval():
    records = [record(i, a={"up": 1.0, "down": 0.25}, b={"up": 0.0} if i < 9 else {}) for i in range(30)]
    summary = summarize(records, ["a", "b"], [UP, DOWN], 0)
    assert entries(summary, "b")["up"]["p"] < 0.01
    text = table(summary, "a title")
    assert "| a | 1.000 [1.000, 1.000] | 0.250 [0.250, 0.250] |" in text
    assert "| b | 0.000 |  |" in text
    assert "fewer than 10 values (up 9), too few for an interval or a test" in text
    assert "In brackets" in text
    alone = table(summarize(records[:1], ["a"], [UP, DOWN], 0), "a title")
    assert "| a | 1.000 | 0.250 |" in alone
    assert "(up 1, down 1)" in alone
    assert "[" not in alone
    assert "In brackets" not in alone
    widths = [[len(line.get_xdata()) for line in panel.lines] for panel in draw(summary, "a title").axes]
    assert widths == [[2, 1, 1, 2], [2, 1, 2]]  # interval and point of a, point of b, the first one's line


def test_a_table_of_nothing_says_so():
    assert table(summarize([record(0, a={})], ["a"], [UP], 0), "a title") == (
        "a title\n\nNo metric has a value: none of them applies to a sample of those that were drawn, or every method "
        "failed.\n"
    )
