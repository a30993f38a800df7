"""The report in a real browser, without a network.

It takes the package playwright and a Chromium: playwright's own, or the one that CHROME_BIN names.
Without them these tests are skipped.
"""

import os
from pathlib import Path

import pytest
from reports import RADII, Page, certify, hostile, run, sentence, vnnlib, word

playwright = pytest.importorskip(
    "playwright.sync_api", reason="no browser: pip install playwright, playwright install chromium"
)

# What is outside its plot, its word or the page; to be [] at any width.
OVERFLOW = """() => {
  const found = [];
  if (document.documentElement.scrollWidth > window.innerWidth) found.push('page is too wide');
  for (const svg of document.querySelectorAll('svg')) {
    const [, , width, height] = svg.getAttribute('viewBox').split(' ').map(Number);
    for (const mark of svg.querySelectorAll('rect, text, path, line')) {
      const box = mark.getBBox(), slack = 0.5;
      if (box.x < -slack || box.y < -slack || box.x + box.width > width + slack
          || box.y + box.height > height + slack) found.push(mark.outerHTML);
    }
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        binary = os.environ.get("CHROME_BIN")
        if not binary and not Path(started.chromium.executable_path).exists():
            pytest.skip("no browser: run `playwright install chromium`, or set CHROME_BIN")
        # --no-sandbox: Chromium refuses to run as root with it, and the page is our own
        yield started.chromium.launch(executable_path=binary, args=["--no-sandbox"])


@pytest.fixture(params=[(1000, "light"), (400, "dark")], ids=["wide", "narrow"])
def visit(browser, request, tmp_path):
    """Opens the report of some results; the page, and the requests and complaints it made."""
    width, scheme = request.param
    context = browser.new_context(
        offline=True, color_scheme=scheme, viewport={"width": width, "height": 800}
    )
    page = context.new_page()
    page.requests, page.complaints = [], []
    page.on("request", lambda request: page.requests.append(request.url))
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("dialog", lambda dialog: page.complaints.append(dialog.message))

    def visit(results):
        status, page.source = run(results, tmp_path)
        assert status == 0
        page.goto((tmp_path / "page.html").as_uri())
        return page

    yield visit
    context.close()


def everything():
    words = [word(1, 0.0123), word(2, None)]
    long = certify("x" * 300, text="y" * 300, margin=-1.0, result="unknown")
    wide = certify("\u8a9e" * 40)  # East Asian characters
    return [*RADII, sentence("w", positions=words), certify("m"), long, wide,
            *(vnnlib(f"p{i}", "unsat", [i + 1.0]) for i in range(70)), vnnlib("q", "sat", [-50.0])]


def test_the_browser_sees_the_page_as_it_was_written(visit):
    page = visit(everything())
    counts = page.evaluate(
        "() => { const n = {}; for (const e of document.querySelectorAll('*'))"
        " n[e.localName] = (n[e.localName] || 0) + 1; return n; }"
    )
    assert counts == Page(page.source).counts  # nothing was repaired
    assert page.requests == [page.url] and page.complaints == []


def test_everything_is_in_its_place_at_any_width(visit):
    page = visit(everything())
    assert page.evaluate(OVERFLOW) == []
    drawn = page.locator("rect.proved").evaluate_all("all => all.map(e => e.getBBox().width)")
    assert len(drawn) > 70 and max(drawn) > 100
    back, front = (
        page.evaluate(f"getComputedStyle(document.body).{name}")
        for name in ("backgroundColor", "color")
    )
    assert back != front


def test_bars_have_the_lengths_of_their_numbers(visit):
    page = visit(RADII)
    rows = page.locator("g.row").evaluate_all(
        "all => all.map(e => [e.querySelector('title').textContent.split(':')[0],"
        " e.querySelector('rect.proved').getBBox().width])"
    )
    widths = dict(rows)
    assert list(widths) == ["b", "c", "a"]
    assert widths["b"] == pytest.approx(3 * widths["a"], rel=1e-3)
    assert widths["c"] == pytest.approx(2 * widths["a"], rel=1e-3)


def test_hostile_text_is_shown_and_does_nothing(visit):
    page = visit(hostile())
    assert page.title() == "Certificates: results.jsonl"
    assert page.requests == [page.url] and page.complaints == []
    assert page.locator("script, img").count() == 0
    assert "<script>document.title='owned'</script><img" in page.inner_text("td.long bdi >> nth=0")
