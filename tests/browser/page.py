"""The report in a real browser: headless Chromium, light, dark, narrow and in print.

Not collected with the other tests, because it needs Debian's `chromium` package:

    python -m pytest tests/browser/page.py --basetemp=data/.browser

leaves the screenshots in data/.browser for somebody to look at. `KAVA_PAGE` names another
index.html to check than the made-up one.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from kava_core.reporting.inputs import read_findings
from kava_core.reporting.page import compare, write_report
from tests.reporting.pipeline import TRAINING, make_pipeline

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--enable-logging=stderr",
]
DARK = "--blink-settings=preferredColorScheme=0"

# Runs in a copy of the page, whose own policy forbids scripts. What a person would see as broken:
# a page wider than its window, an empty drawing, text that leaves its drawing.
MEASURE = """
<script>
const wrong = [];
const page = document.documentElement;
if (page.scrollWidth > window.innerWidth) wrong.push(`the page is ${page.scrollWidth} px wide`);
for (const drawing of document.querySelectorAll("svg")) {
  const name = drawing.getAttribute("aria-label");
  const box = drawing.getBoundingClientRect();
  if (box.width < 300 || box.height < 100) wrong.push(`${name}: drawing is too small`);
  for (const text of drawing.querySelectorAll("text")) {
    const b = text.getBoundingClientRect();
    if (b.left < box.left - 1 || b.right > box.right + 1 ||
        b.top < box.top - 1 || b.bottom > box.bottom + 1)
      wrong.push(`${name}: "${text.textContent}" leaves the drawing`);
  }
}
const said = document.createElement("pre");
said.id = "measured";
said.textContent = JSON.stringify({wrong, drawings: document.querySelectorAll("svg").length});
document.body.append(said);
</script>
"""


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if "KAVA_PAGE" in os.environ:
        return Path(os.environ["KAVA_PAGE"]).absolute()
    made = make_pipeline(
        tmp_path_factory.mktemp("made") / "data",
        problems=600,
        records=800,
        test_sets=("synthetic", "svamp"),
    )
    findings = read_findings(made.folder, made.students)
    folder = tmp_path_factory.mktemp("page")
    settings: dict[str, Any] = {"teacher": {"model": "scratch", "training": TRAINING}}
    write_report(
        folder,
        findings,
        compare(findings),
        title="Latent reasoning, made up",
        pipeline="made",
        settings=settings,
    )
    return folder / "index.html"


def browser() -> str:
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.fail("no chromium found. Install it: apt-get install chromium")
    return program


def chromium(profile: Path, page: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [browser(), *FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert console == [], "the page complained"
    return done


@pytest.mark.parametrize(
    ("name", "flags", "paper"),
    [
        ("light", ["--window-size=1280,9000"], "light"),
        ("dark", ["--window-size=1280,9000", DARK], "dark"),
        ("narrow", ["--window-size=640,9000"], "light"),
    ],
)
def test_it_is_drawn_on_the_paper_of_the_theme(
    page: Path, tmp_path: Path, name: str, flags: list[str], paper: str
) -> None:
    shot = tmp_path / f"{name}.png"
    chromium(tmp_path / "profile", page, *flags, f"--screenshot={shot}")
    grey = Image.open(shot).convert("L")
    corner = grey.getpixel((2, 2))
    assert isinstance(corner, int)
    assert (corner > 200) == (paper == "light")
    darkest, lightest = grey.getextrema()
    assert isinstance(darkest, int) and isinstance(lightest, int)
    assert lightest - darkest > 180


@pytest.mark.parametrize("width", [640, 1024, 1280, 1920])
def test_nothing_leaves_its_place(page: Path, tmp_path: Path, width: int) -> None:
    copy = without_policy(page, tmp_path / "index.html")
    text = copy.read_text(encoding="utf-8")
    copy.write_text(text.replace("</body>", MEASURE + "</body>"), encoding="utf-8")
    done = chromium(tmp_path / "profile", copy, f"--window-size={width},1000", "--dump-dom")
    found = re.search(r'<pre id="measured">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    assert found is not None
    measured = json.loads(html.unescape(found[1]))
    assert measured["drawings"] >= 3
    assert measured["wrong"] == []


# Each way of running a script that a text may try; whichever runs says so in the title.
RAN = "document.title = 'RAN'"
EVIL = (
    f'</td></pre><script>{RAN}</script><img src=x onerror="{RAN}"><svg onload="{RAN}"></svg>'
    f'<iframe srcdoc="<script>parent.{RAN}</script>"></iframe><a href="javascript:{RAN}">x</a>'
    f"' onmouseover='{RAN}' {{{{ 7 * 7 }}}} \u202e \x1b[2J =HYPERLINK(0) \U0001f600"
)


def poisoned(folder: Path) -> Path:
    """A report whose every question, answer, topic and token is EVIL."""
    made = make_pipeline(folder / "data", problems=60, records=40)
    file = made.folder / "evaluation" / "predictions.parquet"
    rows = pq.read_table(file).to_pylist()
    for row in rows:
        row.update(question=EVIL, text=EVIL, answer=EVIL, gold=EVIL, topic=EVIL)
    pq.write_table(pa.Table.from_pylist(rows), file)
    latents = made.folder / "evaluation" / "interpretability.json"
    for plain in ("ian has", "question mark", "<b>", " apples"):
        evil = json.dumps(EVIL)[1:-1]
        latents.write_text(latents.read_text("utf-8").replace(plain, evil), "utf-8")
    findings = read_findings(made.folder, made.students)
    page = folder / "page"
    page.mkdir()
    write_report(page, findings, compare(findings), title=EVIL, pipeline="made", settings={})
    return page / "index.html"


def without_policy(page: Path, copy: Path) -> Path:
    """The page with nothing but its escaping between a text and a script."""
    text = page.read_text(encoding="utf-8")
    text, count = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    assert count == 1
    copy.write_text(text, encoding="utf-8")
    return copy


def title(done: subprocess.CompletedProcess[str]) -> str:
    found = re.search(r"<title>(.*?)</title>", done.stdout, flags=re.DOTALL)
    assert found is not None
    return found[1]


def test_no_text_runs_as_a_script(tmp_path: Path) -> None:
    page = poisoned(tmp_path)
    copy = without_policy(page, tmp_path / "copy.html")
    for each in (page, copy):
        done = chromium(tmp_path / "profile", each, "--dump-dom")
        assert title(done) != "RAN" and "RAN" in title(done)  # it is the text that it holds
        assert not re.search(
            r"<(script|img|iframe)\b|<[^>]* on(error|load|mouseover)=", done.stdout
        )
    control = tmp_path / "control.html"
    control.write_text(f"<title></title><body><p>{EVIL}</p></body>", encoding="utf-8")
    done = subprocess.run(
        [browser(), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
         control.as_uri()], capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert title(done) == "RAN"


def test_it_prints(page: Path, tmp_path: Path) -> None:
    paper = tmp_path / "page.pdf"
    chromium(tmp_path / "profile", page, f"--print-to-pdf={paper}", "--no-pdf-header-footer")
    content = paper.read_bytes()
    assert content.startswith(b"%PDF")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", content)) <= 30
