"""The HTML report in a real browser, where one is installed: headless Chromium, at a desktop's and a phone's width, in both colour schemes."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from deployopt.report.html import render

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
LOOK = """<script>
addEventListener("load", () => {
  const wide = [...document.querySelectorAll("main *")].filter((e) => !e.closest(".scroll") && e.getBoundingClientRect().right > innerWidth + 1);
  const shown = [...document.querySelectorAll("svg")].filter((e) => e.getBoundingClientRect().height > 0).length;
  const facts = { width: innerWidth, scrolls: document.documentElement.scrollWidth, wide: wide.map((e) => e.outerHTML.slice(0, 80)), charts: shown,
                  paper: getComputedStyle(document.body).backgroundColor };
  document.title = JSON.stringify(facts);
});
</script></body>"""


def seen(page: str, folder: Path, width: int, *options: str) -> tuple[dict[str, Any], str]:
    """What a browser of this width makes of the page, and what it writes to its console."""
    assert CHROMIUM is not None
    path = folder / "report.html"
    path.write_text(page.replace("</body>", LOOK))
    frame = folder / "frame.html"  # Chromium's own window is never narrower than 500 pixels
    frame.write_text(f'<iframe id="f" src="report.html" style="width:{width}px;height:2000px;border:0"></iframe>')
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--enable-logging=stderr", *options]
    frame.write_text(frame.read_text() + "<script>f.onload = () => setTimeout(() => { document.title = f.contentDocument.title; }, 100);</script>")
    done = subprocess.run(
        [*command, f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=3000", "--dump-dom", frame.as_uri()],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None, done.stdout[:500]
    facts: dict[str, Any] = json.loads(html.unescape(title[1]))
    return facts, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_the_page_fits_a_desktop_and_a_phone_and_its_console_stays_empty(report: dict[str, Any], tmp_path: Path) -> None:
    page, papers = render(report), set()
    for width, options in ((1280, ()), (390, ()), (390, ("--force-dark-mode", "--blink-settings=preferredColorScheme=0"))):
        facts, console = seen(page, tmp_path, width, *options)
        assert console == ""
        assert (facts["width"], facts["wide"]) == (width, [])
        assert facts["scrolls"] <= width
        assert facts["charts"] >= 5
        papers.add(facts["paper"])
    assert len(papers) == 2, "light and dark look the same"
