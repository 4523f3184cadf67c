"""Pages in a real browser: headless Chromium runs and photographs them; tests are skipped where it is missing."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest

# WebGL by SwiftShader, which computes on the CPU what a graphics card would.
DRAW = ["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]


def run(url: str, folder: Path, *words: str) -> str:
    """Chromium's answer for a page; `folder` takes its profile."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium: apt-get install chromium")
    command = [chromium, "--headless", "--no-sandbox", "--hide-scrollbars", *DRAW, *words]
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=20000", url]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=True).stdout


def screenshot(
    url: str, folder: Path, size: tuple[int, int], *, dark: bool = False
) -> tuple[np.ndarray, Path]:
    """The page as photographed at (width, height): pixels uint8 [H, W, 3] in BGR, and the file."""
    picture = folder / f"{size[0]}{'-dark' * dark}.png"
    words = [f"--window-size={size[0]},{size[1]}", f"--screenshot={picture}"]
    run(url, folder, *words, *(["--force-dark-mode"] if dark else []))
    shown = cv2.imread(str(picture))
    assert shown is not None
    return shown, picture


def dump(url: str, folder: Path, *words: str) -> str:
    """The document after its scripts have run."""
    return run(url, folder, "--dump-dom", "--window-size=800,700", *words)


def facts(url: str, folder: Path, *words: str) -> dict[str, str]:
    """What the page's scripts have written into the attributes data-NAME of its root."""
    (root,) = re.findall(r"<html([^>]*)>", dump(url, folder, *words))
    return dict(re.findall(r'data-([a-z]+)="([^"]*)"', root))


def with_script(page: Path, out: Path, script: str) -> str:
    """URL of a copy of the page that runs one script more at its end, which the page itself would forbid."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    assert text.endswith("</body></html>\n")
    out.write_text(text.removesuffix("</body></html>\n") + f"<script>{script}</script></body></html>\n")
    return out.as_uri()
