"""The report as a reader has it, opened as a file in a headless Chromium: by mouse, by keyboard, in the dark."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from helpers.browser import until

from captum_lnstat import cli, zoo


@pytest.fixture
def written(tmp_path):
    """Nine images, several of a class, and one that is broken."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, scene in enumerate(zoo.scenes()[:9]):
        scene.image.save(folder / f"scene-{number}.png")
    (folder / "broken.png").write_text("no image")
    output = tmp_path / "report.html"
    result = CliRunner().invoke(cli.main, ["report", str(folder), "--output", str(output), "--top-k", "2"])
    assert result.exit_code == 1, result.output
    return output


def test_the_report_in_a_browser(browser, written):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.actions.action_builder import ActionBuilder
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select

    def one(selector):
        return browser.find_element(By.CSS_SELECTOR, selector)

    def all_of(selector):
        return browser.find_elements(By.CSS_SELECTOR, selector)

    def seen(stack):
        """Opacity of the map that is chosen."""
        shown = stack.find_element(By.CSS_SELECTOR, "[data-of]:not([hidden])")
        return float(shown.value_of_css_property("opacity"))

    def focused():
        return browser.switch_to.active_element

    def away():
        """Move the pointer to the left of the pictures, wherever the page scrolls."""
        pointer = ActionBuilder(browser)
        for height in (60, 2):
            pointer.pointer_action.move_to_location(2, height)
        pointer.perform()
        until(lambda: not all_of(".stack:hover"), "the pointer is off the pictures")

    def confidences():
        return [float(card.get_attribute("data-confidence")) for card in all_of(".card")]

    def classes():
        return [card.get_attribute("data-class") for card in all_of(".card")]

    browser.get(written.as_uri())
    stacks = all_of(".stack")
    assert len(stacks) == 9
    given = confidences()

    # By mouse: the map is there while the pointer is, and stays after a click.
    assert [seen(stack) for stack in stacks] == [0] * 9
    ActionChains(browser).move_to_element(stacks[1]).perform()
    assert [seen(stack) for stack in stacks] == [0, 0.75, *[0] * 7]
    stacks[1].click()
    away()
    assert seen(stacks[1]) == 0.75
    assert stacks[1].get_attribute("aria-pressed") == "true"
    stacks[1].click()

    # Another class of the menu is another map.
    first = stacks[1].find_element(By.CSS_SELECTOR, "[data-of]:not([hidden])").get_attribute("src")
    Select(all_of(".card select")[1]).select_by_index(1)
    assert stacks[1].find_element(By.CSS_SELECTOR, "[data-of]:not([hidden])").get_attribute("src") != first

    # In order.
    order = Select(one("#sort"))
    order.select_by_value("surest")
    assert confidences() == sorted(given, reverse=True) != given
    order.select_by_value("doubtful")
    assert confidences() == sorted(given)
    order.select_by_value("class")
    assert classes() == sorted(classes(), key=str.casefold)
    headings = [heading.text for heading in all_of(".heading")]
    assert headings == ([f"{name}: {classes().count(name)}" for name in dict.fromkeys(classes())] if headings else [])
    assert bool(headings) == (len(given) >= 3 * len(set(classes())))
    order.select_by_value("given")
    assert confidences() == given

    # By keyboard: one stop for Tab, then the arrows, and the map is there where the focus is.
    away()  # choosing in a menu moved the pointer
    one("#cover").send_keys(Keys.TAB)
    stacks = all_of(".stack")
    assert focused() == stacks[0]
    assert seen(stacks[0]) == 0.75
    columns = len({stack.location["x"] for stack in stacks})
    assert 1 < columns < 9
    for key, place in (
        (Keys.ARROW_RIGHT, 1), (Keys.ARROW_DOWN, 1 + columns), (Keys.ARROW_LEFT, columns), (Keys.ARROW_UP, 0),
        (Keys.ARROW_UP, 0), (Keys.END, 8), (Keys.ARROW_RIGHT, 8), (Keys.HOME, 0),
    ):  # fmt: skip
        focused().send_keys(key)
        assert focused() == stacks[place]
        assert [seen(stack) > 0 for stack in stacks] == [number == place for number in range(9)]
    focused().send_keys(Keys.ENTER)
    focused().send_keys(Keys.ARROW_RIGHT)
    assert [seen(stack) > 0 for stack in stacks] == [True, True, *[False] * 7]

    # All maps at once, and fainter; pointing then shows the photograph.
    one("#always").click()
    one("#cover").send_keys(Keys.HOME, Keys.ARROW_RIGHT)
    ActionChains(browser).move_to_element(stacks[2]).perform()
    assert [round(seen(stack), 2) for stack in stacks] == [0.05, 0.05, 0, *[0.05] * 6]

    # The colours of the system, then those of the button.
    def back():
        return browser.execute_script("return getComputedStyle(document.body).backgroundColor")

    assert back() == "rgb(255, 255, 255)"
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": dark})
    until(lambda: back() == "rgb(22, 24, 28)", "the colours of a dark system")
    one("#theme").click()
    assert (back(), one("#theme").text) == ("rgb(255, 255, 255)", "Dark")
    one("#theme").click()
    assert (back(), one("#theme").text) == ("rgb(22, 24, 28)", "Light")

    assert "broken.png" in one("#skipped").text
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    )
    until(lambda: browser.execute_script("return document.documentElement.scrollWidth <= innerWidth"), "narrow")

    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"]
    assert [url for url in urls if not url.startswith(("data:", "chrome"))] == [written.as_uri()]
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
