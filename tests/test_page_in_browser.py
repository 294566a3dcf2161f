"""The page as a person meets it, in a browser. Skipped without gradio, selenium or Chromium."""

import base64
import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from model_folders import model_folder
from PIL import Image
from processes import ONE_DEVICE

from cascade import testing

pytest.importorskip("gradio")
webdriver = pytest.importorskip("selenium.webdriver")
if not (shutil.which("chromium") and shutil.which("chromedriver")):
    pytest.skip("needs chromium and chromedriver", allow_module_level=True)

from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--use-gl=swiftshader", "--enable-unsafe-swiftshader", "--window-size=1200,900"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
UPLOAD = "input[type=file][accept*='.json']"
PATIENCE = 40


def served(folder):
    """A running `cascade serve` of a model of 8 -> 16 px, its address, and its own home."""
    home = folder / "home"
    (home / "temporary").mkdir(parents=True)
    stages = (testing.base_stage(128), testing.super_resolution_stage(8, 128))
    model = model_folder(folder / "model", *stages)
    names = ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME")
    root = os.path.dirname(os.path.dirname(testing.__file__))
    environment = {
        **{**os.environ, **dict.fromkeys(names, str(home))},
        **{"TMPDIR": str(home / "temporary"), "XLA_FLAGS": ONE_DEVICE, "PYTHONPATH": root},
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "cascade", "serve", "--model", str(model), "--port", "0"],
        cwd=home,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stderr.readline()
    told = re.fullmatch(r"the page is at (http://127\.0\.0\.1:\d+) until Ctrl-C\n", line)
    if told is None:
        process.kill()
        pytest.fail(line + process.stderr.read())
    return process, told[1], home


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    process, address, home = served(tmp_path_factory.mktemp("page"))
    yield process, address, home
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def browser(server, tmp_path_factory):
    options = webdriver.ChromeOptions()
    for option in (*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    driver.get(server[1])
    found(driver, "#prompt textarea")
    yield driver
    driver.quit()


def until(true):
    """What `true` gives once it gives something."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        with contextlib.suppress(Exception):  # an element was replaced while it was looked at
            if value := true():
                return value
        time.sleep(0.05)
    pytest.fail("nothing came")


def found(browser, selector):
    """The first element of that kind, once there is one."""
    return until(lambda: browser.find_element(By.CSS_SELECTOR, selector))


def text(browser, name):
    return browser.find_element(By.ID, name).text


def field(browser, name):
    return found(browser, f"#{name} :is(textarea, input)")


def fill(browser, name, value):
    """Type the value in place of what is there."""

    def typed():
        field(browser, name).send_keys(Keys.CONTROL + "a")
        field(browser, name).send_keys(value)
        return field(browser, name).get_attribute("value") == value

    until(typed)


def opened(browser, name):
    """The accordion, with what is in it."""
    button = found(browser, f"#{name} button.label-wrap")
    if "open" not in button.get_attribute("class").split():
        button.click()


def links(browser):
    """Under the pictures: what each is to be called when it is saved, and its address."""
    found = browser.find_elements(By.CSS_SELECTOR, "#easel figcaption a")
    return {link.get_attribute("download"): link.get_attribute("href") for link in found}


def fetched(address):
    with urllib.request.urlopen(address) as answer:
        return answer.read()


def draw(browser):
    """Press Draw, wait for its end: {name: content} of all that can be downloaded."""
    before = links(browser)
    browser.find_element(By.ID, "draw").click()
    under_way = "#easel .stages"
    until(
        lambda: links(browser) != before and not browser.find_elements(By.CSS_SELECTOR, under_way)
    )
    now = links(browser)
    return {name: fetched(address) for name, address in now.items()}


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(content)))


def draw_for_long(browser):
    fill(browser, "steps-8", "900")
    fill(browser, "num", "16")
    browser.find_element(By.ID, "draw").click()
    until(lambda: "8 px step" in " ".join(text(browser, "easel").split()))


def test_by_keys_alone_a_prompt_is_typed_and_drawn_stage_by_stage(browser):
    opened(browser, "more")
    fill(browser, "steps-8", "60")
    browser.execute_script("""
        document.body.tabIndex = -1; document.body.focus(); window.seen = [];
        const easel = document.getElementById("easel");
        new MutationObserver(() => seen.push(easel.innerText)).observe(
            easel, {subtree: true, childList: true, characterData: true});
    """)
    inside = "return document.getElementById('prompt').contains(document.activeElement)"
    for _ in range(5):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        if browser.execute_script(inside):
            break
    assert browser.execute_script(inside)
    ActionChains(browser).send_keys("a red circle", Keys.ENTER).perform()
    assert set(until(lambda: links(browser))) == {
        *("cascade-0-8.png", "cascade-0-16.png", "cascade-0.json"),
    }
    seen = [" ".join(told.split()) for told in browser.execute_script("return seen")]
    order = ("8 px compiling 16 px waiting", r"8 px step \d+ of 60", "8 px drawn 16 px compiling")
    at = [next(i for i, told in enumerate(seen) if re.search(one, told)) for one in order]
    assert at == sorted(at)


def test_a_slider_goes_back_to_the_noise(browser):
    slider = found(browser, "#scrub input[type=range]")
    assert slider.get_attribute("max") == "11"  # 8 guesses at 8 px, 2 at 16, the picture
    slider.send_keys(Keys.HOME)
    until(lambda: "8 px, seed 0: guess 1 of 8" in text(browser, "easel"))
    shown = browser.find_element(By.CSS_SELECTOR, "#easel img")
    until(lambda: browser.execute_script("return arguments[0].naturalWidth", shown) == 8)
    slider.send_keys(Keys.END)
    until(lambda: "cascade-0.json" in links(browser))


def test_an_error_is_the_sentence_of_python(browser):
    fill(browser, "seed", "-1")
    browser.find_element(By.ID, "draw").click()
    until(lambda: text(browser, "message") == "seed=-1: must be 0 or more")
    assert "cascade-0.json" in links(browser)  # what was drawn stays


def test_a_downloaded_json_fills_the_form_and_draws_the_same_bits(browser, tmp_path):
    fill(browser, "prompt", "a big blue ring")
    fill(browser, "seed", "9")
    fill(browser, "num", "2")
    first = draw(browser)
    file = tmp_path / "cascade-10.json"
    file.write_bytes(first[file.name])
    fill(browser, "prompt", "another")
    browser.find_element(By.ID, "reset").click()
    until(lambda: "All settings are the model's own" in text(browser, "message"))
    assert field(browser, "steps-8").get_attribute("value") == "3"
    browser.find_element(By.CSS_SELECTOR, UPLOAD).send_keys(str(file))
    until(lambda: "cascade-10.json has filled in the form" in text(browser, "message"))
    values = [field(browser, n).get_attribute("value") for n in ("prompt", "seed", "num")]
    assert values == ["a big blue ring", "10", "1"]
    again = draw(browser)
    assert again == {name: content for name, content in first.items() if "-10" in name}
    assert json.loads(again[file.name])["stages"]["base8"]["steps"] == 60


def test_a_json_of_something_else_is_refused_in_a_sentence(browser, tmp_path):
    for name, content, message in (
        ("one.json", b"{", r"one\.json: not readable as JSON \(.*\); it may be damaged"),
        ("two.json", b"{}", r"this JSON is not of a picture: it names no stages"),
    ):
        (tmp_path / name).write_bytes(content)
        browser.find_element(By.CSS_SELECTOR, UPLOAD).send_keys(str(tmp_path / name))
        until(lambda message=message: re.fullmatch(message, text(browser, "message")))


def test_a_picture_is_drawn_anew_where_it_is_painted_over(browser, tmp_path):
    grey = np.full((64, 64, 3), 90, np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    fill(browser, "prompt", "a green heart")
    opened(browser, "begin")
    undo = "#editor button[aria-label=Undo]"
    found(browser, undo)
    found(browser, "#editor input[type=file]").send_keys(str(tmp_path / "grey.png"))
    canvas = found(browser, "#editor canvas")
    until(lambda: found(browser, undo).is_enabled())  # it has the picture

    def drawn_from():
        record = json.loads(next(v for k, v in draw(browser).items() if k.endswith(".json")))
        pictures = [record["init_png"], record["mask_png"]]
        return record["edited"], *(p and pixels(base64.b64decode(p)) for p in pictures)

    edited, init, mask = drawn_from()
    assert edited["masked"] is False and mask is None
    assert init.shape == (16, 16, 3) and np.abs(init.astype(int) - 90).max() <= 1
    hand = ActionChains(browser).move_to_element(canvas).click_and_hold()
    hand.move_by_offset(20, 0).move_by_offset(-20, 10).release().perform()
    edited, init, mask = drawn_from()
    assert edited["masked"] is True and np.abs(init.astype(int) - 90).max() <= 1
    assert mask.min() == 0 and mask[8, 8] == 255


def test_a_drawing_is_stopped_and_one_that_waits_has_its_place_in_the_queue(browser, server):
    until(
        lambda: browser.find_elements(
            By.CSS_SELECTOR, "#more .narrow input, #more .narrow textarea"
        )
    )
    draw_for_long(browser)
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    browser.get(server[1])
    field(browser, "prompt").send_keys("a star", Keys.ENTER)
    until(lambda: "1 drawing is before yours in the queue." in text(browser, "easel"))
    browser.find_element(By.ID, "stop").click()
    until(lambda: text(browser, "message") == "Stopped.")
    browser.close()
    browser.switch_to.window(first)
    browser.find_element(By.ID, "stop").click()
    until(lambda: "Stopped." in text(browser, "message"))


def test_a_narrow_screen_shows_all_without_scrolling_sideways(browser):
    narrow = {"width": 375, "height": 700, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", narrow)
    opened(browser, "more")
    opened(browser, "begin")
    time.sleep(0.5)
    wide = browser.execute_script("return document.documentElement.scrollWidth")
    outside = browser.execute_script("""
        return [...document.querySelectorAll("button, textarea, input:not([type=file]), img")]
            .filter(e => e.getBoundingClientRect().width && e.getBoundingClientRect().right > 375)
            .map(e => e.outerHTML.slice(0, 200));
    """)
    assert wide == 375 and outside == []


def test_the_browser_has_asked_no_other_address(browser, server):
    entries = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {
        entry["params"]["request"]["url"]
        for entry in entries
        if entry["method"] == "Network.requestWillBeSent"
    }
    assert len(asked) > 20
    inside = (server[1] + "/", "data:", "blob:", "chrome:")  # the last are of an empty tab
    assert [url for url in asked if not url.startswith(inside)] == []


def test_a_page_elsewhere_whose_name_leads_here_gets_no_answer(server):
    for host, status in (("localhost:1", 200), ("elsewhere.example", 403), ("127.0.0.1.x.y", 403)):
        request = urllib.request.Request(server[1], headers={"Host": host})
        try:
            with urllib.request.urlopen(request) as answer:
                assert answer.status == status
        except urllib.error.HTTPError as e:
            assert e.code == status


def test_an_upload_that_is_too_large_is_refused(server):
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.json"\r\n\r\n'
    body += b" " * (2**24 + 1) + b"\r\n--x--\r\n"
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    request = urllib.request.Request(server[1] + "/gradio_api/upload", data=body, headers=kind)
    with pytest.raises(urllib.error.HTTPError) as e:
        urllib.request.urlopen(request)
    assert e.value.code == 413


def test_ctrl_c_ends_it_in_a_line_and_leaves_nothing(browser, server):
    """While it draws, and with nothing written outside of the temporary folder."""
    process, _, home = server
    draw_for_long(browser)
    written = list((home / "temporary").iterdir())
    assert len(written) == 1 and written[0].name.startswith("cascade-page-")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=PATIENCE)
    assert (process.returncode, said) == (130, "interrupted\n")
    assert [str(p.relative_to(home)) for p in home.rglob("*")] == ["temporary"]


def test_sigterm_ends_it_in_silence(tmp_path):
    process, address, home = served(tmp_path)
    assert b"<gradio-app" in fetched(address)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=PATIENCE)
    assert (process.returncode, said) == (143, "")
    assert [str(p.relative_to(home)) for p in home.rglob("*")] == ["temporary"]
