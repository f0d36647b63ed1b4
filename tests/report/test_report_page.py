"""The pages in a real Chromium: offline, slider, sorting, search, phone width, dark colours, hostile names."""

import itertools
import json
import re
import shutil

import numpy as np
import pytest
from depth_folders import write_folders

from ddfup import cli
from ddfup.report import read_report

# A slash cannot be in a file name: tags that need one are not closed.
HOSTILE = ('"><img src=x onerror="document.title=1">', "<script>document.title=1<", "=1+1", "' onfocus='alert(1)")
NAMES = (*(f"room/{index:02d}" for index in range(14)), *HOSTILE)


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    root = tmp_path_factory.mktemp("réports & <b>")
    write_folders(root, NAMES, noise=0.002)
    pred, gt = root / "pred", root / "gt"
    extras = ["--guides", str(root / "guides"), "--inputs", str(root / "low")]
    (pred / "broken.png").write_bytes(b"<script>")
    shutil.copy(gt / "room" / "00.png", gt / "broken.png")
    assert cli.main(["report", str(pred), str(gt), *extras, "-o", str(root / "a"), "-q"]) == 3
    assert cli.main(["report", str(root / "low"), str(root / "low"), "-o", str(root / "plain"), "-q"]) == 0
    assert cli.main(["report", str(gt), str(gt), "-o", str(root / "b"), "-q"]) in (0, 3)
    both = [str(root / "a"), str(root / "b")]
    assert cli.main(["report", "compare", *both, "-o", str(root / "cmp"), "-q"]) == 0
    for folder, kind in ((gt / "room", "depth"), (root / "guides" / "room", "rgb")):
        (root / "set" / kind).mkdir(parents=True)
        for index in (0, 1):
            (file,) = folder.glob(f"{index:02d}.*")
            shutil.copy(file, root / "set" / kind)
    methods = ["--protocol", "robust", "--method", "bicubic", "--method", "joint-bilateral"]
    assert cli.main(["benchmark", str(root / "set"), *methods, "-o", str(root / "bench"), "-q"]) == 0
    return root


def show(browser, path, *, width=1280, height=900, dark=False):
    """Open a page; forget what was recorded before."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    # Without smooth scrolling: a click must not have to hit what is still on its way.
    wishes = {"prefers-color-scheme": "dark" if dark else "light", "prefers-reduced-motion": "reduce"}
    features = [{"name": name, "value": value} for name, value in wishes.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get("about:blank")
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(path.as_uri())
    return browser


def requests(browser):
    """Every address that was asked for."""
    messages = (json.loads(entry["message"])["message"] for entry in browser.get_log("performance"))
    return [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]


def run(browser, script, *arguments):
    return browser.execute_script(script, *arguments)


def wait_for(browser, condition):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 20).until(lambda _: run(browser, f"return {condition}"))


CARDS = "return [...document.querySelectorAll('.card:not([hidden])')].map(c => c.querySelector('h3').textContent)"
ROWS = "return [...document.querySelectorAll('#table tbody tr:not([hidden])')].map(r => r.cells[{}].textContent)"


@pytest.mark.parametrize("page", ["a/report.html", "plain/report.html", "cmp/compare.html", "bench/benchmark.html"])
@pytest.mark.parametrize("width", [1280, 390, 320])
def test_opens_offline_without_errors_at_any_width(chromium, reports, page, width):
    browser = show(chromium, reports / page, width=width, dark=width == 390)
    # To the end and back, so that every picture that is loaded late is loaded.
    run(browser, "for (let y = 0; y < document.body.scrollHeight; y += 400) scrollTo({top: y, behavior: 'instant'})")
    wait_for(browser, "[...document.images].every(i => i.complete)")
    assert browser.get_log("browser") == []
    folder = (reports / page).parent.as_uri()
    for address in requests(browser):
        assert address.startswith(("data:", "blob:", folder)), address
    # Not against innerWidth: a phone zooms out until all fits.
    assert run(browser, "return document.documentElement.scrollWidth") <= width
    assert run(browser, "return [...document.images].every(i => i.naturalWidth > 0)")
    assert run(browser, "return document.title").startswith("Depth ")


def test_pictures_become_sharp_when_their_folder_is_there(chromium, reports, tmp_path):
    first = "document.querySelector('.card img')"
    browser = show(chromium, reports / "a" / "report.html")
    assert run(browser, f"return {first}.src.startsWith('data:image/webp')")
    to_cards = "document.querySelector('#images').scrollIntoView({behavior: 'instant'})"
    run(browser, to_cards)
    wait_for(browser, f"{first}.currentSrc.endsWith('-result.jpg')")
    shutil.copy(reports / "a" / "report.html", tmp_path / "alone.html")
    browser = show(chromium, tmp_path / "alone.html")
    run(browser, to_cards)
    wait_for(browser, f"{first}.complete && !{first}.hasAttribute('data-full')")
    assert run(browser, f"return {first}.naturalWidth > 0 && {first}.src.startsWith('data:image/webp')")


def split(browser):
    stage = "document.querySelector('.stage')"
    return run(
        browser,
        f"return [getComputedStyle({stage}).getPropertyValue('--split'), {stage}.querySelector('input').value,"
        f"getComputedStyle({stage}.querySelector('.over')).clipPath]",
    )


def test_the_slider_moves_by_keyboard_and_mouse(chromium, reports):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    browser = show(chromium, reports / "a" / "report.html")
    slider = browser.find_element("css selector", ".stage input")
    assert split(browser)[:2] == ["50%", "50"]
    slider.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert split(browser)[0] == "52%"
    slider.send_keys(Keys.HOME)
    assert split(browser)[0] == "0%"
    assert "100%" in split(browser)[2]
    slider.send_keys(Keys.END)
    assert split(browser)[0] == "100%"
    run(browser, "arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", slider)
    width = slider.size["width"]
    ActionChains(browser).move_to_element_with_offset(slider, -int(width * 0.25), 0).click().perform()
    assert abs(int(split(browser)[1]) - 25) <= 1
    ActionChains(browser).click_and_hold().move_by_offset(int(width * 0.5), 5).release().perform()
    assert abs(int(split(browser)[1]) - 75) <= 1
    # Seen by screen readers as what it is.
    assert slider.aria_role == "slider"
    assert slider.accessible_name == "Input left of the divider, result right of it"
    assert slider.get_attribute("aria-valuetext") == f"Input {split(browser)[1]} percent"


def test_the_slider_moves_by_finger_and_leaves_scrolling_alone(chromium, reports):
    browser = show(chromium, reports / "a" / "report.html", width=390, height=800)
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    try:
        slider = browser.find_element("css selector", ".stage input")
        run(browser, "arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", slider)
        box = run(
            browser, "const b = arguments[0].getBoundingClientRect(); return [b.x, b.y, b.width, b.height]", slider
        )

        def touch(*places):
            """Put a finger down at the first place (shares of the picture), move it over the others, lift it."""
            for index, (across, down) in enumerate(places):
                point = {"x": box[0] + across * box[2], "y": box[1] + down * box[3]}
                kind = "touchMove" if index else "touchStart"
                browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [point]})
            browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
            return int(split(browser)[1])

        assert abs(touch((0.5, 0.5), (0.6, 0.5), (0.7, 0.55), (0.8, 0.55)) - 80) <= 1
        assert abs(touch((0.25, 0.3)) - 25) <= 1
        before = run(browser, "return scrollY")
        assert abs(touch((0.9, 0.9), (0.9, 0.6), (0.9, 0.3), (0.9, 0.1)) - 25) <= 1
        assert wait_for(browser, f"scrollY > {before} + 20")
    finally:
        browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})


def test_without_inputs_the_slider_shows_the_truth(chromium, reports):
    browser = show(chromium, reports / "plain" / "report.html")
    assert browser.find_element("css selector", ".tag.left").text == "Ground truth"


def test_the_table_sorts_both_ways_and_says_so(chromium, reports):
    from selenium.webdriver.common.keys import Keys

    rows = read_report(reports / "a").good
    browser = show(chromium, reports / "a" / "report.html")
    heads = browser.find_elements("css selector", "#table thead th")
    worst_first = [row.name for row in sorted(rows, key=lambda row: -row.figures["rmse"])]
    assert run(browser, ROWS.format(0)) == worst_first
    assert heads[1].get_attribute("aria-sort") == "descending"
    for column, name in ((1, "rmse"), (4, "delta1"), (12, "ssim"), (13, "valid_fraction")):
        button = heads[column].find_element("tag name", "button")
        seen = []
        for _ in range(2):
            button.send_keys(Keys.ENTER)
            order = heads[column].get_attribute("aria-sort")
            shown = [next(r for r in rows if r.name == each).figures[name] for each in run(browser, ROWS.format(0))]
            assert shown == sorted(shown, reverse=order == "descending")
            seen.append(order)
        assert sorted(seen) == ["ascending", "descending"]
        sorted_by = browser.find_elements("css selector", "th[aria-sort]")
        assert sorted_by == [heads[column]]
    heads[0].find_element("tag name", "button").click()
    names = run(browser, ROWS.format(0))
    assert [name for name in names if name.startswith("room")] == [f"room/{index:02d}" for index in range(14)]


def test_cards_come_worst_first_a_few_at_a_time(chromium, reports):
    from selenium.webdriver.support.ui import Select

    rows = read_report(reports / "a").good
    browser = show(chromium, reports / "a" / "report.html")
    worst_first = [row.name for row in sorted(rows, key=lambda row: -row.figures["rmse"])]
    assert run(browser, CARDS) == worst_first[:12]
    more = browser.find_element("id", "more")
    assert more.text == "Show 6 more (6 left)"
    run(browser, "arguments[0].click()", more)
    assert run(browser, CARDS) == worst_first
    assert not more.is_displayed()
    assert run(browser, "return document.activeElement.querySelector('h3').textContent") == worst_first[12]
    Select(browser.find_element("id", "order")).select_by_visible_text("worst SSIM first")
    by_ssim = [row.name for row in sorted(rows, key=lambda row: row.figures["ssim"])]
    assert run(browser, CARDS) == by_ssim[:12]
    browser.find_element("id", "find").send_keys("ROOM/0")
    assert sorted(run(browser, CARDS)) == [f"room/{index:02d}" for index in range(10)]
    assert len(run(browser, ROWS.format(0))) == 10
    assert browser.find_element("id", "found").text == "10 of 18"


def test_a_row_leads_to_its_card(chromium, reports):
    browser = show(chromium, reports / "a" / "report.html")
    link = browser.find_elements("css selector", "#table tbody a")[-1]
    name = link.get_attribute("textContent")
    assert name not in run(browser, CARDS)
    run(browser, "arguments[0].click()", link)
    assert run(browser, "return document.activeElement.querySelector('h3').textContent") == name
    assert name in run(browser, CARDS)


def test_hostile_names_are_shown_and_do_nothing(chromium, reports):
    browser = show(chromium, reports / "a" / "report.html")
    assert set(HOSTILE) <= set(run(browser, ROWS.format(0)))
    assert run(browser, "return document.scripts.length") == 1
    assert run(browser, "return document.querySelectorAll('[onerror], [onfocus]').length") == 0
    assert run(browser, "return document.title") == f"Depth report: {reports / 'pred'}"
    failed = browser.find_element("id", "failed").text
    assert "broken" in failed and "is not PNG by its content" in failed and "<script" in failed
    # The page's policy stops what would get in all the same.
    run(browser, "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"document.title=1\">')")
    run(
        browser,
        "const s = document.createElement('script'); s.textContent = 'document.title=2'; document.body.append(s)",
    )
    run(browser, "new Image().src = 'https://example.com/x.png'")
    wait_for(browser, "document.querySelector('img[src=x]').complete")
    assert run(browser, "return document.title").startswith("Depth report: ")
    stopped = [
        entry["message"] for entry in browser.get_log("browser") if "Content Security Policy" in entry["message"]
    ]
    assert len(stopped) >= 3


@pytest.mark.parametrize("page", ["a/report.html", "cmp/compare.html", "bench/benchmark.html"])
def test_colours_follow_the_system_and_text_is_readable(chromium, reports, page):
    """Contrast of all text against its background: 4.5 to 1 or better (WCAG AA)."""
    measure = """
      const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
      const rgb = (colour) => { canvas.fillStyle = '#000'; canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map(v => v / 255)
          .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); };
      const light = (c) => 0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2];
      const background = (e) => { for (; e; e = e.parentElement) {
        const colour = getComputedStyle(e).backgroundColor;
        if (!colour.endsWith(', 0)')) return colour; } return '#fff'; };
      const found = {};
      for (const e of document.querySelectorAll('body *')) {
        if (![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) continue;
        if (!e.checkVisibility() || e.closest('script, svg, .tag')) continue;
        const [a, b] = [light(rgb(getComputedStyle(e).color)), light(rgb(background(e)))];
        const key = e.tagName + '.' + e.className;
        found[key] = Math.min(found[key] ?? 99, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05));
      }
      return [found, light(rgb(getComputedStyle(document.body).backgroundColor))];
    """
    for dark in (False, True):
        found, ground = run(show(chromium, reports / page, dark=dark), measure)
        assert (ground < 0.05) == dark
        assert len(found) > 10
        assert {key: ratio for key, ratio in found.items() if ratio < 4.5} == {}


@pytest.mark.parametrize("dark", [False, True])
def test_plots_and_controls_stand_out(chromium, reports, dark):
    """Bars against their card, frames of controls against the page: 3 to 1 or better (WCAG 1.4.11)."""
    browser = show(chromium, reports / "a" / "report.html", dark=dark)
    colours = run(
        browser,
        """
        const of = (selector, name) => getComputedStyle(document.querySelector(selector))[name];
        return [[of('.plot rect', 'fill'), of('.tile', 'backgroundColor')],
                [of('.plot .mean', 'stroke'), of('.plot rect', 'fill')],
                [of('#find', 'borderTopColor'), of('body', 'backgroundColor')],
                [of('#order', 'borderTopColor'), of('#order', 'backgroundColor')]];
        """,
    )

    def light(colour):
        parts = [int(number) / 255 for number in re.findall(r"\d+", colour)[:3]]
        return np.dot(
            [0.2126, 0.7152, 0.0722], [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        )

    for pair in colours:
        low, high = sorted(map(light, pair))
        assert (high + 0.05) / (low + 0.05) >= 3, pair


def test_axes_have_two_ends_that_differ(chromium, reports):
    browser = show(chromium, reports / "a" / "report.html")
    ends = run(
        browser, "return [...document.querySelectorAll('.ends')].map(e => [...e.children].map(s => s.textContent))"
    )
    assert len(ends) > 5
    for low, high in ends:
        assert low != high


def test_every_picture_and_control_has_a_name(chromium, reports):
    browser = show(chromium, reports / "a" / "report.html")
    assert run(browser, "return [...document.images].every(i => i.alt.trim())")
    assert run(browser, "return document.documentElement.lang") == "en"
    for element in browser.find_elements(
        "css selector", "select, input[type=search], .stage input, .plot, #more, .scroll"
    ):
        # What is hidden has no name for anybody.
        assert element.accessible_name or not element.is_displayed(), element.get_attribute("outerHTML")
    levels = run(browser, "return [...document.querySelectorAll('h1,h2,h3')].map(h => +h.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    ids = run(browser, "return [...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
