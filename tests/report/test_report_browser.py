"""The pages in a real browser: keys, filters, pages, search, narrow screens, and that nothing is fetched or run."""

import pytest
from report_browser import browser, missing

from leaml_plugin.report import write_report

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "chromium is there")


@pytest.fixture(scope="module")
def driver():
    with browser() as b:
        yield b


@pytest.fixture(scope="module")
def page(driver, shared_run):
    driver.resize(1200)
    driver.open(shared_run.report)
    return driver


@pytest.fixture
def fresh(driver, shared_run):
    driver.resize(1200)
    driver.open(shared_run.report)
    return driver


FOCUSED = "const c = document.activeElement.closest('.card'); return c && c.querySelector('.id').textContent"
FIRST = "return document.querySelector('#pseudo-gallery .card .id').textContent"
LINE = "return document.querySelector('#pseudo-gallery .status-line').textContent"


def test_the_page_runs_its_own_script_and_nothing_else(page):
    assert page.console() == []
    assert page.run("return document.querySelector('#pseudo-gallery .tools').hidden") is False
    # a script that slipped in would be refused by the policy
    page.run("const s = document.createElement('div'); s.innerHTML = '<img src=x onerror=\"window.bad = 1\">';"
             "document.body.append(s)")  # fmt: skip
    assert page.run("return window.bad") is None
    assert any("Content Security Policy" in line for line in page.console())
    fetched = page.run("return performance.getEntriesByType('resource').map(e => e.name)")
    assert all(name.startswith(("data:", "file:")) for name in fetched)


def test_markup_in_a_question_is_text(page):
    assert "<script>alert('x')</script>" in page.run("return document.querySelector('.pair .question').textContent")
    assert page.run("return document.querySelectorAll('.card script, .card [onerror]').length") == 0


def test_keys_move_among_pictures_and_pages(fresh):
    fresh.press("j")
    assert fresh.run(FOCUSED) == "img_00000"
    fresh.press("j", "right")
    assert fresh.run(FOCUSED) == "img_00002"
    fresh.press("k")
    assert fresh.run(FOCUSED) == "img_00001"
    fresh.press("n")
    fresh.wait("return document.querySelector('#pseudo-gallery').dataset.drawn === '2'")
    assert fresh.run(FOCUSED) == fresh.run(FIRST) == "img_00024"
    fresh.press("k")  # back over the start of the page
    fresh.wait("return document.querySelector('#pseudo-gallery').dataset.drawn === '1'")
    assert fresh.run(FOCUSED) == "img_00023"
    fresh.press("down")
    fresh.press("/")
    fresh.press("j", "j")
    assert fresh.run("return document.activeElement.value") == "jj"


def test_arrow_down_goes_to_the_card_below(fresh):
    fresh.press("j", "down")
    columns = fresh.run(
        "return getComputedStyle(document.querySelector('.cards')).gridTemplateColumns.split(' ').length"
    )
    assert columns > 1
    assert fresh.run(FOCUSED) == f"img_{columns:05d}"
    fresh.press("up")
    assert fresh.run(FOCUSED) == "img_00000"


def test_single_keys_can_be_turned_off(fresh):
    fresh.run("document.querySelector('.shortcuts').click(); document.activeElement.blur()")
    fresh.press("j")
    assert fresh.run(FOCUSED) is None


def test_the_first_tab_stop_leads_to_the_report(fresh):
    fresh.press("tab")
    assert fresh.run("return document.activeElement.className") == "skip"
    fresh.press("enter")
    assert fresh.run("return document.activeElement.id") == "main"


def test_filters_and_search(fresh):
    fresh.run(
        "const s = document.querySelector('#pseudo-gallery .by-status');"
        "s.value = [...s.options].find(o => o.text.startsWith('malformed')).value; s.dispatchEvent(new Event('change'))"
    )
    fresh.wait(LINE.replace("textContent", "textContent.includes('match')"))
    words = fresh.run("return [...document.querySelectorAll('#pseudo-gallery .card')].map(c =>"
                      "[...c.querySelectorAll('.word')].map(w => w.textContent))")  # fmt: skip
    assert words and all("malformed" in w for w in words)

    fresh.run(
        "const g = document.querySelector('#pseudo-gallery'); g.querySelector('.by-status').value = '';"
        "g.querySelector('.words').value = 'IMG_00031'; g.querySelector('.tools button').click()"
    )
    fresh.wait(LINE.replace("textContent", "textContent.startsWith('Pictures 1 to 1 of 1 ')"))
    assert fresh.run(FIRST) == "img_00031"
    fresh.wait(
        "const i = document.querySelector('#pseudo-gallery .card img'); return i && i.complete && i.naturalWidth"
    )

    fresh.run(
        "const g = document.querySelector('#pseudo-gallery');"
        "g.querySelector('.words').value = 'no such words'; g.querySelector('.tools button').click()"
    )
    fresh.wait(LINE.replace("textContent", "textContent === 'No picture matches.'"))


def test_a_card_drawn_by_the_script_is_the_card_of_the_template(fresh):
    tree = """
      const text = (e) => [...e.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data.trim()).join("");
      const walk = (e) => [e.tagName, e.className, e.hidden, e.alt || "", text(e), [...e.children].map(walk)];
      return JSON.stringify([...document.querySelectorAll('#pseudo-gallery .card')].map(walk));
    """
    before = fresh.run(tree)
    fresh.press("j", "n")
    fresh.wait("return document.querySelector('#pseudo-gallery').dataset.drawn === '2'")
    assert fresh.run(tree) != before
    fresh.press("p")
    fresh.wait("return document.querySelector('#pseudo-gallery').dataset.drawn === '1'")
    assert fresh.run("return document.querySelectorAll('#pseudo-gallery .card img').length") == 23  # one is missing
    assert "refused; as written: <script>" in before
    assert fresh.run(tree) == before


@pytest.mark.parametrize("width", [320, 390, 768, 1440])
def test_no_width_scrolls_the_page_sideways(page, width):
    page.resize(width)
    sizes = page.run("return [document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert sizes[0] <= sizes[1]
    # a table that is wider than its place can be scrolled by keys, one that fits is no tab stop
    page.wait(
        "return [...document.querySelectorAll('.scroll')].every(r =>"
        " (r.scrollWidth > r.clientWidth) === r.hasAttribute('tabindex'))"
    )
    page.resize(1200)


@pytest.mark.parametrize("dark", [False, True])
def test_text_has_contrast(page, dark):
    page.resize(1200, dark=dark)
    script = """
      const rgb = (c) => c.match(/[\\d.]+/g).slice(0, 3).map(Number);
      const lum = (c) => rgb(c).map((v) => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
        .reduce((s, v, i) => s + v * [.2126, .7152, .0722][i], 0);
      const paper = lum(getComputedStyle(document.documentElement).backgroundColor);
      return ['h2', '.quiet, .ci', '.good .status', '.bad .status', '.bad .question', 'nav a'].map((s) => {
        const ink = lum(getComputedStyle(document.querySelector(s)).color);
        return (Math.max(ink, paper) + .05) / (Math.min(ink, paper) + .05);
      });
    """
    assert min(page.run(script)) >= 4.5
    page.resize(1200)


@pytest.mark.parametrize("dark", [False, True])
def test_numbers_on_the_heat_map_can_be_read(page, dark):
    page.resize(1200, dark=dark)
    script = """
      const canvas = Object.assign(document.createElement('canvas'), {width: 1, height: 1});
      const context = canvas.getContext('2d', {willReadFrequently: true});
      const lum = (c) => {
        context.fillStyle = c;
        context.fillRect(0, 0, 1, 1);
        return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3)
          .map((v) => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
          .reduce((s, v, i) => s + v * [.2126, .7152, .0722][i], 0);
      };
      return [...document.querySelectorAll('.heat td[style]')].map((cell) => {
        const style = getComputedStyle(cell), a = lum(style.color), b = lum(style.backgroundColor);
        return (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
      });
    """
    ratios = page.run(script)
    assert len(ratios) > 50 and min(ratios) >= 4.4
    page.resize(1200)


@pytest.mark.slow
def test_ten_thousand_pictures_without_a_network(driver, make_run):
    run = make_run(pictures=10_000, samples=1, distinct=20, questions=0, stages=("inputs", "generate", "filter"))
    driver.cdp("Network.enable")
    driver.cdp(
        "Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=-1, uploadThroughput=-1
    )  # fmt: skip
    driver.open(write_report(run))
    assert driver.run("return document.querySelectorAll('#pseudo-gallery .card').length") == 24
    driver.run(
        "const p = document.querySelector('#pseudo-gallery .page');"
        "p.value = '417'; p.dispatchEvent(new Event('change'))"
    )
    driver.wait("return document.querySelector('#pseudo-gallery').dataset.drawn === '417'")
    assert driver.run(LINE) == "Pictures 9\u202f985 to 10\u202f000 of 10\u202f000"
    drawn = "return [...document.querySelectorAll('#pseudo-gallery .card img')].filter(i => i.naturalWidth).length"
    assert driver.run(drawn) == 16
    driver.run(
        "const g = document.querySelector('#pseudo-gallery');"
        "g.querySelector('.words').value = 'img_07777'; g.querySelector('.tools button').click()"
    )
    driver.wait(LINE.replace("textContent", "textContent.startsWith('Pictures 1 to 1 of 1 ')"))
    assert driver.run(FIRST) == "img_07777" and driver.console() == []
    driver.cdp("Network.disable")


def test_a_lost_folder_is_said(driver, make_run):
    import shutil

    run = make_run(pictures=60, questions=0, stages=("inputs", "generate", "filter"))
    path = write_report(run)
    shutil.rmtree(path.with_name("report_files"))
    driver.open(path)
    assert driver.run("return document.querySelectorAll('#pseudo-gallery .card').length") == 24
    driver.press("n")
    driver.wait(LINE.replace("textContent", "textContent.includes('keep that folder beside this page')"))
