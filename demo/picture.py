"""Take the README's picture: the demo's asset graph in a running Dagster UI.

`make demo`, `make ui` in another terminal, then `make picture`. Needs a Chromium on the PATH.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

GROUP = "locations/__repository__@modelcall/asset-groups/demo_code_quality/lineage"
CROP = {"x": 294, "y": 412, "width": 1052, "height": 196}


def main(target: Path, port: str) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        sys.exit("no chromium on the PATH: install your distribution's package")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 900}, device_scale_factor=2)
        page.goto(f"http://localhost:{port}/{GROUP}")
        page.get_by_text("8 partitions").last.wait_for(timeout=60_000)
        page.screenshot(path=target, clip=CROP)
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
