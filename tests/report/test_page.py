"""The page shows the numbers it was given, leaves out what is not there, and needs nothing beside itself."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from tcaq.errors import UsageError
from tcaq.report import Entry, Trial, grid_image, write_report
from tcaq.report.figures import Curve, sqnr_figure
from tests.report.conftest import CONV, FIXED, LINEAR, MIX, SAMPLER, R, evaluation, images
from tests.report.reading import Page

Make = Callable[..., Entry]


def written(path: Path, entries: list[Entry]) -> str:
    write_report(path, "A <title> & more", entries, {"sampler": "DDIM <50>"}, float_bytes=123_000)
    return path.read_text(encoding="utf-8")


@pytest.fixture
def text(tmp_path: Path, whole: Make, bare: Make) -> str:
    return written(tmp_path / "report.html", [bare(), whole()])


@pytest.fixture
def page(text: str) -> Page:
    return Page(text)


def test_the_headline_table(page: Page) -> None:
    rows = page.table("The float model and its quantized versions")
    assert rows[0] == [
        "Model", "Bits", "FD ↓", "FD / float ↓", "KID ↓", "FD to float ↓", "PSNR ↑", "SSIM ↑", "Weights", "Sampling",
        "Memory", "Quantization",
    ]  # fmt: skip
    assert rows[1:] == [
        ["DDIMScheduler, 40 steps, N = 2000, seed 11, features reference"],
        ["float", "32", "20.50", "1.000", "0.01230", "–", "–", "–", "123.0 kB", "71.0 s", "912 MB", "–"],
        [
            "tcaq <4>",
            "W4A8",
            "42.62",
            "2.079",
            "0.04560",
            "9.750",
            "18.38",
            "0.8125",
            "–",
            "5.0 min",
            "1.25 GB",
            "84.8 s",
        ],
        ["Not evaluated"],
        ["min-max", "W4A8", "–", "–", "–", "–", "–", "–", "–", "–", "–", "84.8 s"],
    ]


def test_the_tables_of_the_stages(page: Page) -> None:
    assert page.table("Sorted by how much r differs")[1:] == [
        [CONV, "4", f"{min(R):.2f}", "1.50", f"{max(R):.2f}", "50%", "2.32", "1.60"]
    ]
    assert page.table("Agreement")[1:] == [[MIX, "2 of 3", "−2.500", "3.750", "0.04000", "0.04000", "2 of 3"]]
    assert page.table("Calibration steps in a row")[1:] == [["900", "900", "4", "1"], ["500", "100", "8", "2"]]
    assert page.table("Signal-to-noise ratios at each") == [
        ["Timestep", "Forward process", "4 bits", "8 bits", "Runs at"], ["900", "0.01000", "2.500", "30.00", "4"],
        ["500", "1.250", "1.000", "20.00", "8"], ["100", "99.00", "0.7500", "10.00", "8"],
    ]  # fmt: skip
    assert page.table("The run keeps")[1:] == [["0", "31.25", "yes"], ["1", "33.50", "no"]]
    assert page.table("Error of each unit before and after")[1:] == [
        ["down<i>", "0", "0.5000", "0.1250"], ["mid", "0", "0.2500", "0.06250"],
        ["down<i>", "1", "0.3750", "0.1000"], ["mid", "1", "0.2000", "0.05000"],
    ]  # fmt: skip
    plans = [rows for rows, caption in zip(page.tables, page.captions, strict=True) if "attention product" in caption]
    assert len(plans) == 2, "one for each entry"
    for rows in plans:
        assert rows[1:] == [
            [CONV, "conv", "sint4", "auint8"], [LINEAR, "linear", "float: kept <float> & whole"],
            [MIX, "mix", "–", "daq8, auint8"], [FIXED, "mix", "–", "log2-8, auint8"],
        ]  # fmt: skip
    costs = [rows for rows, caption in zip(page.tables, page.captions, strict=True) if "Wall time" in caption]
    assert costs[0][1:] == [
        ["collect/0", "10.5 s", "500 MB"], ["observe", "4.2 s", "600 MB"], ["reconstruct/0", "70.0 s", "800 MB"]
    ]  # fmt: skip


def test_provenance(page: Page) -> None:
    for words in ('"program": "tcaq"', '"weights": "c0ffee"', '"torch": "2.99.0"', '"torchmetrics": "1.99"',
                  "quantization seed 5", "N = 2000, seed 11", "DDIM <50>", "A <title> & more"):  # fmt: skip
        assert words in page.text


def test_the_samples_are_those_given(page: Page) -> None:
    shown = [(alt, source) for tag, a in page.elements if tag == "img" for alt, source in [(a["alt"], a["src"])]]
    given = {"float": images(), "min-max": images(seed=2), "tcaq <4>": images(seed=1)}
    assert [alt for alt, _ in shown] == [f"5 samples of {label}, number 1 to 5" for label in given]
    for (_, source), value in zip(shown, given.values(), strict=True):
        picture = Image.open(BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,"))))
        expected = grid_image(value, 5, 64 // 7, transparent=True)
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(expected))


def test_the_heat_maps_hold_the_ranges(text: str) -> None:
    found = re.findall(r'<image [^>]*href="data:image/png;base64,([^"]*)"[^>]*id="entry-1-range-0-', text, re.DOTALL)
    before, after = (np.asarray(Image.open(BytesIO(base64.b64decode(data.replace("\n", ""))))) for data in found[:2])
    # channels from the quietest to the loudest: 1, then 3 (always 3), then 4 4 2, then 8 16 8
    maxima = np.array([[1.0, 3.0, 4.0, 8.0], [1.0, 3.0, 4.0, 16.0], [1.0, 3.0, 2.0, 8.0]])
    for shown, values in ((before, maxima), (after, maxima / [1.0, 1.0, 2.0, 4.0])):
        level = np.log10(values) / np.log10(16.0)
        colors = (mpl.colormaps["viridis"](level)[..., :3] * 255).round()
        pixels = shown[..., :3].astype(float)
        small = pixels[:: pixels.shape[0] // 3, :: pixels.shape[1] // 4][:3, :4]
        assert (
            min(np.abs(small - colors).max(), np.abs(small[::-1] - colors).max()) <= 1
        )  # SVG may store it upside down


def test_a_curve_is_drawn_where_its_values_are() -> None:
    timesteps, sqnr = [900.0, 500.0, 300.0, 100.0], [21.5, 12.25, 17.0, 30.0]
    svg = sqnr_figure([Curve("a", timesteps, sqnr)], "one")
    (line,) = re.findall(r'<path d="([^"]*)" clip-path[^>]*style="fill: none; stroke: var\(--series-0\)', svg)
    points = np.array([[float(v) for v in pair] for pair in re.findall(r"[ML] (\S+) (\S+)", line)])
    for values, drawn, sign in ((timesteps, points[:, 0], -1), (sqnr, points[:, 1], -1)):  # both axes run backwards
        slope, offset = np.polyfit(values, drawn, 1)
        assert np.sign(slope) == sign
        np.testing.assert_allclose(drawn, slope * np.array(values) + offset, atol=1e-3)


@pytest.mark.parametrize("part", ["sqnr-by-step", "widths", "ranges", "daq", "reconstruction"])
def test_sections_of_missing_stages_are_absent(tmp_path: Path, bare: Make, page: Page, part: str) -> None:
    assert part in page.values("id")
    assert f"#{part}" in page.values("href")
    without = Page(written(tmp_path / "bare.html", [bare()]))
    assert part not in without.values("id")
    assert f"#{part}" not in without.values("href")
    assert {"quality", "samples", "plan", "provenance"} <= set(without.values("id"))


def test_bits_by_layer(tmp_path: Path, traded: Make, page: Page) -> None:
    there = Page(written(tmp_path / "traded.html", [traded()]))
    for what, count, bits in (("weights", "Numbers", "6"), ("inputs", "Products", "3")):
        assert there.table(f"Error of predictions that {what} make, each alone, by width.") == [
            ["Layer", count, "2 bits", "3 bits", "6 bits", "Runs at"],
            [CONV, "432", "0.7100", "0.1900", "0.002300", bits],
        ]
    assert "layer-widths" in there.values("id")
    assert "#layer-widths" in there.values("href")
    assert "layer-widths" not in page.values("id")


def test_names_are_escaped(text: str, page: Page) -> None:
    assert not {"b", "i"} & {tag for tag, _ in page.elements}
    assert "<b>0" not in text
    assert "down.&lt;b&gt;0&lt;/b&gt;&amp;conv$1$" in text


def test_nothing_comes_from_elsewhere(text: str, page: Page) -> None:
    for attribute in ("src", "href", "xlink:href"):
        assert page.values(attribute) or attribute == "src"
        for value in page.values(attribute):
            assert value.startswith(("data:", "#")), value
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert not page.values("src", "script")
    assert "default-src 'none'" in page.values("content", "meta")[1]


def test_it_is_sound_html_with_words_for_every_picture(page: Page) -> None:
    assert page.open == []
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert all(value[1:] in ids for value in page.values("href") + page.values("xlink:href") if value.startswith("#"))
    assert all(a.get("alt") for tag, a in page.elements if tag == "img")
    assert all(a.get("aria-label") for tag, a in page.elements if tag == "svg")
    assert len(page.tables) == len([caption for caption in page.captions if caption.strip()])
    referenced = re.findall(r"url\(#([^)]*)\)", " ".join(page.values("clip-path")))
    assert referenced
    assert set(referenced) <= set(ids)


def test_equal_inputs_give_equal_bytes_below_three_megabytes(tmp_path: Path, whole: Make, text: str) -> None:
    folder = tmp_path / "whole"
    entry = Entry("only", folder, [Trial(SAMPLER, None, images(), images())])
    assert written(tmp_path / "a.html", [entry]) == written(tmp_path / "b.html", [entry])
    assert len(text) < 3_000_000
    assert sorted(path.name for path in tmp_path.glob("*.html")) == ["a.html", "b.html", "report.html"]


def test_a_model_sampled_in_two_ways(tmp_path: Path, whole: Make) -> None:
    entry = whole()
    other = evaluation(fd=30.75) | {"scheduler": "DPMSolverMultistepScheduler", "steps": 20}
    entry = Entry(entry.name, entry.folder, [*entry.trials, Trial("DPM", other, images(seed=3), images(seed=4))])
    text = written(tmp_path / "two.html", [entry])
    page = Page(text)
    rows = page.table("The float model and its quantized versions")[1:]
    assert [row[0] for row in rows] == [
        "DDIMScheduler, 40 steps, N = 2000, seed 11, features reference", "float", entry.name,
        "DPMSolverMultistepScheduler, 20 steps, N = 2000, seed 11, features reference", "float", entry.name,
    ]  # fmt: skip
    assert rows[-1][3] == "1.500"
    assert f"{entry.name}, DPM" in page.text
    assert len(page.values("src", "img")) == 4
    plans = [caption for caption in page.captions if "attention product" in caption]
    assert len(plans) == 1, "what is told of the run is told once"


def test_large_images_are_shrunk(tmp_path: Path, bare: Make) -> None:
    large = images(3, channels=3).repeat_interleave(40, 2).repeat_interleave(40, 3)
    write_report(tmp_path / "a.html", "t", [Entry("e", bare().folder, [Trial(SAMPLER, None, large, large)])], {})
    (first, *_) = Page((tmp_path / "a.html").read_text()).values("src", "img")
    picture = Image.open(BytesIO(base64.b64decode(first.removeprefix("data:image/png;base64,"))))
    assert picture.size == (3 * 128 + 2 * 2, round(240 * 128 / 280))


def test_two_entries_of_one_name_are_refused(tmp_path: Path, bare: Make) -> None:
    entry = bare()
    with pytest.raises(UsageError, match="names that differ, given 'min-max', 'min-max'"):
        write_report(tmp_path / "a.html", "t", [entry, entry], {})
    assert not (tmp_path / "a.html").exists()
