"""Whom a release recommends, its picture, and its page in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from conftest import Command

from quantize.publishing.picture import COLOURS, INK, draw
from quantize.publishing.quality import Point, pareto_front, recommendation, recommended, summary

LIGHT, DARK = (255, 255, 255), (11, 15, 25)


def point(name: str, nbytes: float, divergence: float, method: str = "gptq", **more: Any) -> Point:
    quality = {
        "kl_divergence": divergence, "top1_agreement": 0.9, "text": "some text", "tokens": 8192,
        "sequence_length": 512, "on_calibration_text": False, "noise_floor": 1e-9,
        "source": {"perplexity": 10.0, "perplexity_error": 0.1}, **more,
    }  # fmt: skip
    return Point(f"{method}/{name}", method, name, int(nbytes * 1e9), quality)


POINTS = [
    point("main", 4.0, 0.05), point("small", 2.0, 1.5), point("worse", 4.5, 0.06), point("Q8_0", 8.0, 0.045, "gguf"),
    point("Q4_K_M", 4.1, 0.2, "gguf"), point("awq", 5.0, 0.048, "awq"),
]  # fmt: skip


def test_nobody_on_the_front_is_beaten_in_both() -> None:
    front = pareto_front(POINTS)
    assert [found.name for found in front] == ["small", "main", "awq", "Q8_0"]
    for other in POINTS:
        assert not any(
            other.nbytes <= best.nbytes and other.kl_divergence < best.kl_divergence for best in front if other != best
        )


def test_the_knee_is_recommended_in_one_sentence() -> None:
    best = recommended(POINTS)
    assert best
    assert best.name == "main"
    sentence = recommendation(POINTS)
    assert sentence == (
        "**GPTQ main** is the best trade of size for quality here: 4.00 GB, 90.0% of its next tokens are the "
        "original's; nearest to the original is GGUF Q8_0 (8.00 GB), the smallest is GPTQ small (2.00 GB)."
    )
    assert recommended([]) is None
    assert summary([]) is None
    assert recommendation([point("main", 1.0, 0.0)]) is not None


def test_the_picture_is_the_same_every_time_and_shows_every_variant() -> None:
    first, again = draw(POINTS), draw(POINTS)
    assert first == again
    assert first is not None
    root = ElementTree.fromstring(first)
    told = [title.text for title in root.iter("{http://www.w3.org/2000/svg}title")]
    assert [text.split(":")[0] for text in told if text] == [found.title for found in POINTS]
    assert draw([]) is None


def test_every_point_of_a_small_release_is_named() -> None:
    root = ElementTree.fromstring(draw(POINTS) or b"")
    texts = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"GPTQ main", "small", "worse", "Q8_0", "Q4_K_M", "awq"} <= texts


@pytest.mark.parametrize(
    "points", [POINTS[:1], [point("main", 1.0, 0.0)], [point("a", 1e-6, 1e-9), point("b", 900.0, 9.0)]]
)
def test_odd_figures_stay_inside_the_picture(points: list[Point]) -> None:
    root = ElementTree.fromstring(draw(points) or b"")
    for circle in root.iter("{http://www.w3.org/2000/svg}circle"):
        assert 0 < float(circle.get("cx", "nan")) < 800
        assert 0 < float(circle.get("cy", "nan")) < 450


@pytest.mark.parametrize("background", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("colour", [INK, *COLOURS.values()])
def test_every_colour_reads_on_light_and_dark(colour: str, background: tuple[int, int, int]) -> None:
    """Contrast as WCAG 2.2 defines it; 3 to 1 is what it asks of graphics and large text."""

    def luminance(channels: tuple[int, ...]) -> float:
        linear = [(c / 255 / 12.92) if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    own = luminance(tuple(int(colour[place : place + 2], 16) for place in (1, 3, 5)))
    low, high = sorted([own, luminance(background)])
    assert (high + 0.05) / (low + 0.05) >= 3


def test_a_transparent_picture_has_no_background() -> None:
    root = ElementTree.fromstring(draw(POINTS) or b"")
    for shape in root.iter():
        assert not (float(shape.get("width", 0)) > 100 and shape.tag.endswith("rect"))


# -- the page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--virtual-time-budget=2000",
)  # fmt: skip


@pytest.fixture
def page(invoke: Command, both: Path, tiny_recipe: Path, tmp_path: Path) -> str:
    measured = ["--set", "measure.samples=2", "--set", "measure.sequence_length=32"]
    assert invoke("measure", tiny_recipe, "--dist", both, *measured, "--device", "cpu").returncode == 0
    manifest = both / "tiny-llama-GPTQ" / "main" / "quantize-manifest.json"
    data = json.loads(manifest.read_text())
    data["ledger"][0] |= {"outcome": "damp_raised"}
    manifest.write_text(json.dumps(data))
    name = "model.name=Tiny <script>alert(1)</script>"
    assert invoke("report", tiny_recipe, "--dist", both, "--set", name).returncode == 0
    return (both / "report.html").read_text()


def test_the_page_needs_nothing_else_and_escapes_names(page: str) -> None:
    assert "<script>alert" not in page
    links = re.findall(r"""(?:src|href)\s*=\s*["']([^"'#][^"']*)""", page)
    assert links == []
    assert page.count("<svg") == 1
    assert "damp_raised" in page
    assert "gptq/main" in page


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed (Debian: chromium)")
def test_the_page_sorts_in_a_browser(page: str, tmp_path: Path) -> None:
    def names(clicks: int) -> list[str]:
        click = "document.querySelectorAll('#variants th button')[5].click();" * clicks
        file = tmp_path / f"page{clicks}.html"
        file.write_text(page.replace("</body>", f"<script>{click}</script></body>"))
        command = [str(BROWSER), *QUIET, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", file.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        body = done.stdout.split("<tbody>")[1].split("</tbody>")[0]
        return re.findall(r"<td>GPTQ</td><td>([^<]+)</td>", body)

    assert names(1) == ["eight", "main"]  # by KL divergence
    assert names(2) == ["main", "eight"]
