"""The report of `fastgpt bench`, opened in a browser."""

import html
import json
import re
import shutil
import subprocess

import pytest
from reports import UNSTEADY, full_document

from fastgpt.bench.charts import charts
from fastgpt.bench.formatting import UNTRUSTED
from fastgpt.bench.page import page
from fastgpt.bench.peers import ENGINES, PEERS

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)

# What a page measures of itself, left behind in its document.
MEASURE = """<pre id="measured"></pre><script>
const box = e => e.getBoundingClientRect();
const within = (a, b) => a.left >= b.left - 1 && a.right <= b.right + 1 &&
                         a.top >= b.top - 1 && a.bottom <= b.bottom + 1;
const root = document.documentElement;
const outside = [];
const overlaps = [];
for (const svg of document.querySelectorAll("svg")) {
  const texts = [...svg.querySelectorAll("text")];
  for (const t of texts) if (!within(box(t), box(svg))) outside.push(t.textContent);
  texts.forEach((a, i) => texts.slice(i + 1).forEach(b => {
    const p = box(a), q = box(b);
    const wide = Math.min(p.right, q.right) - Math.max(p.left, q.left);
    const high = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
    if (wide > 1 && high > 0.4 * Math.min(p.height, q.height))
      overlaps.push(a.textContent + " / " + b.textContent);
  }));
}
for (const e of document.querySelectorAll("main > :not(.scroll), .tile, .tile *, dd, figcaption"))
  if (box(e).right > root.clientWidth + 1 || e.scrollWidth > e.clientWidth + 1 && e.clientWidth)
    outside.push(e.tagName + " " + e.textContent.trim().slice(0, 40));
document.getElementById("measured").textContent = JSON.stringify({
  width: root.clientWidth, scrolls: root.scrollWidth, outside, overlaps,
  charts: [...document.querySelectorAll("figure")].map(f => {
    const b = box(f.querySelector("svg"));
    return [f.id, b.width, b.height, f.querySelectorAll("svg path").length];
  }),
});
</script>"""


def browse(folder, text, *arguments):
    """What the browser prints when it opens this page."""
    if BROWSER is None:
        pytest.skip(f"no browser here, looked for {', '.join(NAMES)}")
    path = folder / "report.html"
    path.write_text(text, encoding="utf-8")
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",  # root's browser starts in no other way
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={folder / 'profile'}",
        *arguments,
        path.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def report():
    document = full_document()
    return page(document, charts(document))


@pytest.mark.parametrize("width", [1280, 520])
def test_charts_are_there_and_nothing_overflows(report, tmp_path, width):
    text = report.replace("</body>", MEASURE + "</body>")
    dom = browse(tmp_path, text, f"--window-size={width},2000", "--dump-dom")
    found = re.search(r'<pre id="measured">(.*?)</pre>', dom, re.DOTALL)
    measured = json.loads(html.unescape(found[1]))
    assert measured["width"] == width
    assert measured["scrolls"] <= width
    assert measured["outside"] == []
    assert measured["overlaps"] == []
    assert [chart[0] for chart in measured["charts"]] == ["speed", "bound", "memory", "error"]
    for name, wide, high, paths in measured["charts"]:
        assert wide >= min(600, width), name
        assert high > 100, name
        assert paths > 20, name


def test_charts_are_painted(report, tmp_path):
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    picture = tmp_path / "report.png"
    browse(tmp_path, report, "--window-size=1280,6500", f"--screenshot={picture}")
    pixels = imread(picture)[..., :3]
    measured = {PEERS[name].engine for row in full_document()["works"] for name in row["peers"]}
    assert len(measured) > 10
    for name in measured:
        alike = abs(pixels - to_rgb(ENGINES[name].colour)).max(axis=-1) < 0.01
        assert alike.sum() > 300, f"nothing in the colour of {name}"


def test_a_page_says_what_it_holds(report):
    text = html.unescape(report)
    for part in (
        "Does not agree",
        "forward GPT-2 124M [1, 1024]",
        "train GPT-2 124M [2, 256]",
        "torch.compile (torch.compile finds no C++ compiler)",
        "Long-Named(R)",
        "5,500 GFLOP/s",
        "<td>fastgpt, int8-dynamic</td>",
        "<td>1.0e-07</td><td>1.0e-06</td>",
        "<td>int4</td><td>8.0000</td><td>+100.000%</td><td>4.0e-05</td><td>4.0e-04</td>",
        "forward GPT-2 124M [8, 128]: other programs kept 12.5 of 64 processors busy",
        f"forward GPT-2 124M [1, 1024]: PyTorch, fused by hand: {UNSTEADY}",
    ):
        assert part in text


def test_what_cannot_be_trusted_is_marked_everywhere():
    document = full_document()
    busy, torch_unsteady = document["works"][1:3]
    drawn = {chart.name: chart for chart in charts(document)}
    html_page = page(document, [])
    speeds = {name: peer["speed_up"] for name, peer in torch_unsteady["peers"].items()}
    assert f"{speeds['torch']:.2f} ?</text>" in drawn["speed"].svg
    assert f"{speeds['torch']:.2f}x ?</td>" in html_page
    assert f"{speeds['hf']:.2f}x</td>" in html_page
    marked = html_page.count("x ?</td>")
    assert marked == len(busy["peers"]) + 1
    assert drawn["speed"].svg.count(" ?</text>") == marked
    assert UNTRUSTED in drawn["speed"].caption
    assert UNTRUSTED in html.unescape(html_page)
    assert "x ?</strong>" in html_page
    for row in document["works"]:
        row["doubt"] = None
        for peer in row["peers"].values():
            peer["doubt"] = None
    quiet = page(document, charts(document))
    assert " ?<" not in quiet
    assert "to be trusted" not in quiet


def test_an_unsteady_reference_spoils_its_whole_row():
    document = full_document()
    document["works"] = document["works"][:1]
    (row,) = document["works"]
    row["peers"]["reference"]["doubt"] = UNSTEADY
    assert page(document, []).count("x ?</td>") == len(row["peers"])


def test_without_a_bound_there_is_a_dash():
    document = full_document()
    document["peaks"] = None
    for row in document["works"]:
        row["bound"] = None
        for peer in row["peers"].values():
            peer["share_of_bound"] = None
    drawn = charts(document)
    assert [chart.name for chart in drawn] == ["speed", "memory", "error"]
    assert "bound" not in drawn[0].svg
    text = page(document, drawn)
    assert text.count("<td>-</td>") == sum(len(row["peers"]) for row in document["works"])
    assert "takes the C++ extension" in text


def test_what_comes_from_outside_is_escaped():
    document = full_document()
    document["machine"] = document["machine"] | {"cpu": "<b>&</b>"}
    assert "<b>&</b>" not in page(document, [])
