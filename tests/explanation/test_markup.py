"""Explanations as HTML, as a notebook shows them: their texts, and what slider and menu do in a browser."""

from __future__ import annotations

from dataclasses import replace

import pytest

from captum_lnstat import explain, zoo
from captum_lnstat.errors import SourceError
from captum_lnstat.explanation.explanation import Explanations


def scene(number):
    return zoo.scenes()[number].image


def test_the_likeliest_classes_are_those_of_one_call_each():
    several = explain("vit-mini", [scene(300), scene(264)], top_k=2, batch_size=1)
    assert [each.name for each in several] == ["image-0", "image-0", "image-1", "image-1"]
    for place, number in enumerate((300, 264)):
        first, second = several[2 * place : 2 * place + 2]
        assert [first.target, second.target] == first.ranked(2)
        for each in (first, second):
            alone = explain("vit-mini", scene(number), each.target)
            assert abs(each.grid - alone.grid).max() <= 1e-6 * abs(alone.grid).max()
    assert isinstance(explain("vit-mini", scene(300), top_k=1), Explanations)
    assert len(explain("vit-mini", scene(300), top_k=100)) == 7
    for wrong in ({"top_k": 0}, {"top_k": 2, "target": 1}):
        with pytest.raises(SourceError, match="expected one of the two, top_k a number from 1"):
            explain("vit-mini", scene(300), **wrong)


def test_a_name_with_brackets_is_whole_in_every_title():
    found = explain("vit-mini", scene(300), class_names=["crane (bird), a bird"] * 7)
    assert found.likely(found.prediction).startswith("crane (bird) ")
    assert found.likeliest(1)[0][0] == "crane (bird)"
    assert found.label(2) == "crane (bird) (2)"


def test_every_text_is_escaped():
    found = explain("vit-mini", scene(300), class_names=[f"<i>{place}&" for place in range(7)])
    html = replace(found, name='<script>"', cautions=("<u>",))._repr_html_()
    for text in ("<i>", "<script>", "<u>"):
        assert text not in html
    assert "&lt;script&gt;&quot;" in html
    assert "&lt;u&gt;" in html
    assert f"&lt;i&gt;{found.target}&amp;" in html


def test_a_notebook_shows_an_image_once_with_a_menu_of_its_classes():
    html = explain("vit-mini", [scene(300), scene(264)], top_k=3)._repr_html_()
    assert html.count("<figure") == html.count("<select") == 2
    assert html.count("<option") == 6
    alone = explain("vit-mini", scene(300), rule="rollout")._repr_html_()
    assert "<select" not in alone
    assert "explained: whatever the class" in alone
    many = explain("vit-mini", [scene(number) for number in range(14)])._repr_html_()
    assert many.count("<figure") == 12
    assert "and 2 more" in many


def test_slider_and_menu_change_their_own_picture_alone(browser, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select

    several = explain("vit-mini", scene(300), top_k=3)
    noted = Explanations([several[0], replace(several[1], cautions=("a caution",)), several[2]])
    page = tmp_path / "cells.html"
    # A notebook puts every output into the page as it stands.
    page.write_text("<!doctype html><meta charset=utf-8>" + noted._repr_html_() * 2, encoding="utf-8")
    browser.get(page.as_uri())
    first, second = browser.find_elements(By.CSS_SELECTOR, "figure.lnstat")

    def shown(figure):
        maps = figure.find_elements(By.CSS_SELECTOR, "img[data-of]")
        return [float(each.value_of_css_property("opacity")) * each.is_displayed() for each in maps]

    assert shown(first) == shown(second) == [0.75, 0, 0]
    stack = first.find_element(By.CSS_SELECTOR, ".stack")
    assert all(image.size == stack.size for image in stack.find_elements(By.CSS_SELECTOR, "img[data-of='0']"))
    assert stack.size["width"] == stack.size["height"] > 200
    first.find_element(By.CSS_SELECTOR, "input").send_keys(Keys.HOME, Keys.ARROW_RIGHT)
    assert shown(first) == [0.05, 0, 0]
    menu = Select(first.find_element(By.CSS_SELECTOR, "select"))
    assert [option.text.split(" (")[0] for option in menu.options] == [
        each.class_names[each.target].split(", ")[0] for each in several
    ]
    assert "a caution" not in first.text
    menu.select_by_index(1)
    assert shown(first) == [0, 0.05, 0]
    assert "a caution" in first.text
    assert shown(second) == [0.75, 0, 0]
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
