"""A page in headless Chromium: what its console says, and what the page is after some JavaScript has run."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

# Before anything else on the page: what a user would see in red in the console.
_WATCH = """<script>
window.troubles = [];
window.addEventListener("error", event => window.troubles.push(String(event.message || event.target.src)), true);
window.addEventListener("unhandledrejection", event => window.troubles.push(String(event.reason)));
for (const kind of ["error", "warn"]) {
  const before = console[kind];
  console[kind] = (...words) => { window.troubles.push(words.join(" ")); before(...words); };
}
</script>"""


def browser() -> str:
    """Chromium or what is built on it; skips the test where there is none."""
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        pytest.skip("no Chromium that could open the page")
    return found


def run_in_page(page: Path, script: str, folder: Path) -> dict[str, Any]:
    """What an expression in JavaScript is after the page has loaded, as ``result``; and ``troubles``, the errors and
    warnings of the console."""
    program = browser()
    after = (
        "<script>window.addEventListener('load', () => setTimeout(() => {"
        f"let result; try {{ result = (() => {{ {script} }})(); }} catch (error) {{ troubles.push(String(error)); }}"
        "const place = document.createElement('pre'); place.id = 'told';"
        "place.textContent = JSON.stringify({ result, troubles }); document.body.append(place); }, 300));</script>"
    )
    watched = folder / "watched.html"
    text = page.read_text(encoding="utf-8").replace("<head>", f"<head>{_WATCH}", 1)
    watched.write_text(text.replace("</body></html>", f"{after}</body></html>"), encoding="utf-8")
    command = [
        program,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--host-resolver-rules=MAP * ~NOTFOUND",  # no network
        f"--user-data-dir={folder / 'profile'}",
        "--window-size=1360,1000",
        "--virtual-time-budget=20000",
        "--dump-dom",
        watched.as_uri(),
    ]
    output = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    told = re.search(r'<pre id="told">(.*?)</pre>', output, re.DOTALL)
    assert told is not None, output[-2000:]
    found: dict[str, Any] = json.loads(html.unescape(told[1]))
    return found
