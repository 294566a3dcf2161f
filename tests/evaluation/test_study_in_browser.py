"""A blind study as a rater meets it, in a browser. Skipped without selenium or Chromium."""

import json
import shutil
import time

import pytest
from study_runs import run_of, write_run

from cascade.commands.eval import people

webdriver = pytest.importorskip("selenium.webdriver")
if not (shutil.which("chromium") and shutil.which("chromedriver")):
    pytest.skip("needs chromium and chromedriver", allow_module_level=True)

from PIL import Image  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--window-size=1200,900", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
PROMPTS = ["a red ring", "two <b>stars</b> & a heart", "a word that says “cascade”", "a green box"]
PATIENCE = 20


def until(true):
    """What `true` gives once it gives something."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if value := true():
            return value
        time.sleep(0.02)
    pytest.fail("nothing came")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """What `cascade eval compare` says of a study of four pairs, of 300 px."""
    folder = tmp_path_factory.mktemp("study")
    runs = [write_run(folder / run, run, PROMPTS, sides=(300,)) for run in "ab"]
    return people.compare(
        people.CompareOptions(run_a=runs[0], run_b=runs[1], out=folder / "study.html")
    )


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def chromium(downloads, tmp_path_factory):
    options = webdriver.ChromeOptions()
    for option in (*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(option)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    logs = {"performance": "ALL", "browser": "ALL"}
    options.set_capability("goog:loggingPrefs", logs)
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def browser(chromium, study):
    """The page as somebody opens it who has answered nothing."""
    chromium.get("file://" + study["page"])

    def emptied():
        chromium.execute_script("localStorage.clear()")
        chromium.refresh()
        return stored(chromium) == 0

    until(emptied)
    return chromium


def stored(browser):
    return browser.execute_script("return localStorage.length")


def reload(browser):
    """Chromium on a busy machine shows, about once in 200 times, an empty storage to a page that
    is loaded again, and the full one to the next: what is stored is not lost."""

    def reloaded():
        browser.refresh()
        return stored(browser)

    until(reloaded)


def press(browser, *keys):
    for key in keys:
        ActionChains(browser).send_keys(key).perform()


def text(browser, name):
    return browser.find_element(By.ID, name).text


def chosen(browser):
    """The answers that are marked: {question: choice}."""
    return browser.execute_script("""
        return Object.fromEntries([...document.querySelectorAll("input:checked")]
            .map(e => [e.name, e.value]))
    """)


def asked(browser):
    return browser.find_element(By.CSS_SELECTOR, "fieldset.asked").get_attribute("id")


def seen(browser, side):
    """The run whose picture is on the screen there, by its colour."""
    complete = (
        "return [...document.images].every(i => i.src && i.complete && i.naturalWidth === 300)"
    )
    until(lambda: browser.execute_script(complete))
    pixel = browser.execute_script(f"""
        const image = document.getElementById("{side}"), canvas = document.createElement("canvas");
        canvas.width = canvas.height = 1;
        canvas.getContext("2d").drawImage(image, 0, 0);
        return [...canvas.getContext("2d").getImageData(0, 0, 1, 1).data].slice(0, 3);
    """)
    return run_of([[pixel]])[0]


def shown_at(browser):
    """The widths of both pictures on the screen, in CSS pixels."""
    return browser.execute_script(
        "return [...document.images].map(i => i.getBoundingClientRect().width)"
    )


def downloaded(browser, downloads, name):
    (downloads / name).unlink(missing_ok=True)
    browser.find_element(By.ID, "download").click()
    until((downloads / name).exists)
    return json.loads((downloads / name).read_text())


def test_by_keys_alone_all_is_answered_and_the_file_gives_the_win_rates(browser, study, downloads):
    """The rater prefers A's picture by quality, and B's for the text, but for one tie."""
    press(browser, "Ann B.", Keys.ENTER)
    left = {}
    for number in range(1, 5):
        until(lambda number=number: text(browser, "count") == f"{number} of 4")
        left[number] = seen(browser, "left")
        assert {left[number], seen(browser, "right")} == {"a", "b"}
        assert shown_at(browser) == [300, 300]  # their own pixels
        a, b = ("1", "3") if left[number] == "a" else ("3", "1")
        press(browser, a)
        assert asked(browser) == "text"
        press(browser, "2" if number == 4 else b, Keys.ENTER)
    until(lambda: "All pairs are answered" in text(browser, "end"))
    found = downloaded(browser, downloads, "answers-Ann-B-.json")
    key = json.loads(open(study["key"]).read())
    assert left == {pair["pair"]: pair["left"] for pair in key["pairs"]}
    assert found["study"] == study["study"] and found["rater"] == "Ann B."
    options = people.PreferenceOptions(
        answers=(downloads / "answers-Ann-B-.json",), key=people.Path(study["key"])
    )
    rates = people.preference(options)["questions"]
    assert [rates["quality"]["overall"][k]["answers"] for k in ("a", "same", "b")] == [4, 0, 0]
    assert [rates["text"]["overall"][k]["answers"] for k in ("a", "same", "b")] == [0, 1, 3]


def test_a_reload_loses_nothing_and_goes_on_at_the_first_open_pair(browser):
    press(browser, "ann", Keys.ENTER, "1", "2", Keys.ENTER, "3")
    reload(browser)
    assert text(browser, "count") == "2 of 4" and text(browser, "who") == "ann"
    assert chosen(browser) == {"quality": "right"} and asked(browser) == "text"
    press(browser, Keys.ARROW_LEFT)
    assert chosen(browser) == {"quality": "left", "text": "same"}


def test_a_page_that_does_not_see_what_is_stored_overwrites_none_of_it(browser):
    press(browser, "ann", Keys.ENTER, "1", "2", Keys.ENTER, "3")
    browser.execute_script("Storage.prototype.getItem = () => null; start()")
    press(browser, Keys.ENTER)
    assert text(browser, "count") == "1 of 4" and chosen(browser) == {}
    press(browser, "3")
    reload(browser)
    press(browser, Keys.ARROW_LEFT)
    assert chosen(browser) == {"quality": "right", "text": "same"}
    press(browser, Keys.ARROW_RIGHT)
    assert chosen(browser) == {"quality": "right"}


def test_one_can_go_back_and_change_what_was_said(browser, downloads):
    press(browser, "ann", Keys.ENTER, "1", "1", Keys.ENTER)
    press(browser, Keys.BACKSPACE)
    assert (text(browser, "count"), asked(browser)) == ("1 of 4", "text")
    press(browser, "3", Keys.BACKSPACE)
    assert asked(browser) == "quality"
    press(browser, "2")
    assert chosen(browser) == {"quality": "same", "text": "right"}
    found = downloaded(browser, downloads, "answers-ann.json")
    assert found["answers"] == [{"pair": 1, "quality": "same", "text": "right"}]
    assert "1 of 4 pairs are in answers-ann.json" in text(browser, "message")


def test_a_pair_that_is_not_answered_whole_is_not_passed_over_at_the_end(browser):
    press(browser, Keys.ENTER)
    assert "name or initials" in text(browser, "message")
    press(browser, "ann", Keys.ENTER, Keys.ENTER)
    assert "Answer both" in text(browser, "message") and text(browser, "count") == "1 of 4"
    press(browser, Keys.ARROW_RIGHT, *("1", "1", Keys.ENTER) * 3)
    assert text(browser, "count") == "1 of 4" and "not been answered" in text(browser, "message")
    press(browser, "1", "1", *[Keys.ENTER] * 4)
    assert "All pairs are answered" in text(browser, "end")


def test_each_rater_has_answers_of_his_or_her_own(browser):
    press(browser, "ann", Keys.ENTER, "1", "1", Keys.ENTER)
    browser.find_element(By.ID, "another").click()
    press(browser, "bob", Keys.ENTER)
    assert text(browser, "count") == "1 of 4" and chosen(browser) == {}
    browser.find_element(By.ID, "another").click()
    press(browser, "ann", Keys.ENTER)
    assert text(browser, "count") == "2 of 4"


def test_with_a_mouse_or_with_tab_and_arrows_it_works_as_well(browser):
    press(browser, "ann", Keys.TAB, Keys.ENTER)
    labels = browser.find_elements(By.CSS_SELECTOR, "fieldset label")
    labels[2].click()
    labels[4].click()
    assert chosen(browser) == {"quality": "right", "text": "same"}
    browser.find_element(By.ID, "next").click()
    press(browser, Keys.TAB, Keys.SPACE, Keys.ARROW_RIGHT, Keys.TAB, Keys.SPACE)
    assert chosen(browser) == {"quality": "same", "text": "left"}
    press(browser, Keys.TAB, Keys.TAB, Keys.ENTER)
    assert text(browser, "count") == "3 of 4"


def test_what_is_shown_names_its_parts_and_tells_no_run(browser):
    press(browser, "ann", Keys.ENTER)
    for prompt in PROMPTS:
        del prompt
        images = browser.find_elements(By.CSS_SELECTOR, "img")
        assert [image.accessible_name for image in images] == [
            *("the picture on the left", "the picture on the right"),
        ]
        press(browser, "1", "1", Keys.ENTER)
    press(browser, Keys.ARROW_LEFT)
    named = "input:not([type=file]), button, fieldset, progress"
    for element in browser.find_elements(By.CSS_SELECTOR, named):
        assert element.accessible_name or not element.is_displayed(), element.get_attribute("id")
    assert browser.execute_script("return document.getElementById('prompt').children.length") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_narrow_screen_all_is_there_without_scrolling_sideways(browser, scheme, tmp_path):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    narrow = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", narrow)
    try:
        press(browser, "ann", Keys.ENTER, "1")
        seen(browser, "left")
        assert browser.execute_script("return document.documentElement.scrollWidth") == 360
        left, right = shown_at(browser)
        assert left == pytest.approx(right, abs=0.05) and left > 150
        file = tmp_path / f"{scheme}.png"
        browser.save_screenshot(str(file))
        with Image.open(file) as picture:
            ground = picture.convert("L").getpixel((2, 2))
        assert ground > 200 if scheme == "light" else ground < 60
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_the_browser_has_asked_no_address_and_refused_nothing(browser, study):
    press(browser, "ann", Keys.ENTER)
    seen(browser, "left")
    entries = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {
        entry["params"]["request"]["url"]
        for entry in entries
        if entry["method"] == "Network.requestWillBeSent"
    }
    inside = ("data:", "blob:", "chrome:")  # the last are of an empty tab
    others = {url for url in asked if not url.startswith(inside)}
    assert others == {"file://" + study["page"]}
    assert browser.get_log("browser") == []  # where breaches of the policy would be told


def test_the_policy_keeps_a_script_of_another_from_running_or_fetching(browser):
    done = browser.execute_async_script("""
        const done = arguments[0], script = document.createElement("script");
        script.textContent = "window.ran = true";
        document.body.append(script);
        fetch("http://127.0.0.1:9/").then(() => done("fetched"), () => done([!!window.ran]));
    """)
    assert done == [False]
    told = " ".join(entry["message"] for entry in browser.get_log("browser"))
    assert "connect" in told and told.count("Content Security Policy") >= 2
