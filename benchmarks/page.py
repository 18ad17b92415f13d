"""docs/results.md, from what the studies left in benchmarks/results.

    python benchmarks/page.py

`quality.py` makes the tables of image quality (`larger`: those of more images) and `spread.py` their standard errors, `make bench`
has the commands behind the second model's (`second`, `parts`, `parts-spread`), `presets.py` makes the table of costs, `speed.py`
those of speed, `speed.py --only growth --results …/growth.json` the figure of it, `integer.py` the table of integer images. A part
whose study has not run yet is left out, and the page says so. What was learned is written by hand in `learned.md` beside this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from growth import TITLES, draw, ratios

from tcaq.recipes.presets import PRESETS
from tcaq.recipes.registry import RECIPES
from tcaq.records import read_json
from tcaq.report.comparison import markdown

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results.md"
LEARNED = ROOT / "benchmarks" / "learned.md"
"""What was learned, in words, with the lab book's figures."""
HEAD = (
    "| {} | FD | ratio | KID | PSNR dB | SSIM | FD to float | quantizing, min | threads | vectors | peak, GiB | code |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|"
)
PARTS = {
    "no-tcr": "without TCR",
    "no-daq": "without DAQ",
    "no-par": "without PAR: reconstruction on the float model's trajectories only",
    "no-stagger": "without staggered step sizes",
    "no-bypass": "without the bypass",
    "no-network": "without the fit of the whole denoiser",
    "no-correction": "without the correction of predicted noise",
    "none": "without any of these: plain block reconstruction",
}
LAYERS = "`tcaq`, widths by layer, the same on average"
BY_STEPS = "the last fit by steps, not by bands; rows without `code` leave a part out of this"
OLDER = {
    "tcaq and its parts": (
        ("tcaq", *PARTS),
        "before the last fit weighed errors by band ([what that does](lab/fifth-trials.md))",
    ),
    "minmax": (("minmax",), "whose grids of attention probabilities covered a sample, not all of them"),
    "apqdm": (("apqdm",), "that searched for groups with attention on grids that rounded it to zero at 4 and 6 bits"),
}
"""Cells from before commits were recorded that today's code would not make again."""
TCAQ_SINCE = {
    "before step sizes of inputs differed from step to step and the last fit saw several steps of an image at once "
    "([what that does](lab/seventh-trials.md))": (
        None, "1f88c7a", "38a13b7", "790d1ae", "c56ceaa", "0ff7423", "23804b8", "31481e9",
    ),
    "whose last fit saw whole trajectories of a third of the calibration images, not parts of all "
    "([the same where they are 32](lab/ninth-trials.md))": ("6b2e792", "3095589"),
}  # fmt: skip
"""How `tcaq` was other than today, with the commits of cells that are of that."""
WIDTHS = ("w8a8", "w6a6", "w4a8", "w4a6", "w4a4", "w3a4", "w2a4", "w4a3")
STUDIES = ("quality", "spread", "iterations", "second", "parts", "presets", "speed", "growth", "integer")
CHECKPOINTS = {"w8a8": "W8A8", "w8a8-symmetric": "W8A8 with weights around zero", "w4a6": "W4A6", "w4a4": "W4A4"}


def main() -> None:
    """Write the page, and the figure that it shows."""
    found = {path.stem: read_json(path) for path in sorted(RESULTS.glob("*.json"))}
    PAGE.write_text("\n".join(page(found)))
    if "growth" in found:
        draw(found["growth"], "w4a4", PAGE.parent / "images" / "growth.png")


def page(found: Mapping[str, Any]) -> list[str]:
    """Lines of the page. Args: found: what each study left, by its name."""
    lines = ["# Results", "", "Written by `python benchmarks/page.py`; do not edit by hand.", ""]
    lines += quality(found["quality"], found.get("spread", {}).get("cells", {})) if "quality" in found else []
    lines += iterated(found["iterations"]) if "iterations" in found else []
    lines += larger(found["larger"], found.get("larger-spread", {}).get("cells", {})) if "larger" in found else []
    lines += (
        second(found["second"], found.get("parts"), found.get("parts-spread", {}).get("cells", {}))
        if "second" in found
        else []
    )
    lines += [*LEARNED.read_text().splitlines(), ""]
    lines += costs(found["presets"]) if "presets" in found else []
    lines += speed(found["speed"]) if "speed" in found else []
    lines += grown(found["growth"]) if "growth" in found else []
    lines += integers(found["integer"]) if "integer" in found else []
    missing = [name for name in STUDIES if name not in found]
    return [*lines, f"Studies that have not run: {', '.join(missing)}.", ""] if missing else lines


def quality(results: Mapping[str, Any], spread: Mapping[str, Any]) -> list[str]:
    """Recipes at four widths, and what each part adds."""
    done: dict[str, Any] = results["cells"]
    first = next(iter(done.values()))["evaluation"]
    lines = [
        "## Image quality",
        "",
        f"`python benchmarks/quality.py`: bundled model, DDIM {results['steps']} steps, {first['num']} images, evaluation seed "
        f"{first['seed']}, calibration seed 0, preset `{results['preset']}`; Fréchet distance (FD) and KID in the feature space of "
        f"the bundled classifier. Float model: FD {first['float']['fd']:.2f}, KID {first['float']['kid']:.5f}. "
        f"Machine: {results['machine']}.",
        "",
        "`ratio` is FD over the float model's, behind ± its standard error over images (`python benchmarks/spread.py`; what "
        "another calibration seed would change is not in it); `FD to float` is the distance between both models' images. PSNR "
        "and SSIM compare images of the same seed. Several processes ran beside each other, a thread each, so that the minutes "
        "are not those of a machine with nothing else to do; those are [below](#what-the-presets-cost) once measured. `vectors`: "
        "the instructions that the processor had, whose sums differ in order. `code`: the commit that a cell is of.",
        "",
        *older(done),
        *glance(done, spread),
        *(line for bits in WIDTHS for line in width_table(bits, done, spread)),
    ]
    for bits in ("w6a6", "w4a4"):
        lines += ablation(f"What each part adds at {bits.upper()}", bits, done, spread)
    return [*lines, *reseeded(done, spread)]


def larger(results: Mapping[str, Any], spread: Mapping[str, Any]) -> list[str]:
    """The same with more images, for those cells whose checkpoints were at hand where a GPU was."""
    lines = [
        f"## {results['num']:,} images".replace(",", " "),
        "",
        f"The protocol above with more images, of checkpoints that were quantized on a processor: sampled on a GPU (`python "
        f"benchmarks/on_gpu.py`), or where it says so in integers on the processor (`python benchmarks/quality.py --num "
        f"{results['num']} --execution integer --results benchmarks/results/larger.json`, which takes less than half of the time; "
        "[how alike both are](#integer-images)). The smallest distances fall with the number of images, that of the float model "
        "as well.",
        "",
        *older(results["cells"]),
    ]
    for bits in WIDTHS:
        rows = [
            row(f"`{name}`", cell, spread.get(name, {}))
            for name, cell in results["cells"].items()
            if name.endswith(bits)
        ]
        lines += [HEAD.format(bits.upper()), *rows, ""] if rows else []
    return lines


def older(done: Mapping[str, Any]) -> list[str]:
    """Which cells are of recipes as they were before; empty if none is."""
    lines = []
    for text, (names, why) in OLDER.items():
        found = [name for name, cell in done.items() if name.rpartition("-")[0] in names and "commit" not in cell]
        if found:
            lines.append(f"- {', '.join(f'`{name}`' for name in found)}: of {text} {why}.")
    for text, commits in TCAQ_SINCE.items():
        found = [
            name for name, cell in done.items() if "--recipe tcaq" in cell["command"] and cell.get("commit") in commits
        ]
        if found:
            lines.append(f"- {', '.join(f'`{name}`' for name in found)}: of tcaq {text}.")
    return (
        ["Today's recipes would make some cells otherwise; those without `code` are the oldest:", "", *lines, ""]
        if lines
        else []
    )


def reseeded(done: Mapping[str, Any], spread: Mapping[str, Any]) -> list[str]:
    """The whole recipe calibrated with other seeds; empty if none was run."""
    cells = {"tcaq-w4a4": "0"} | {name: name.split("-")[1] for name in sorted(done) if name.startswith("seed-")}
    rows = [row(seed, done[name], spread.get(name, {})) for name, seed in cells.items() if name in done]
    return ["### Other calibration seeds, W4A4", "", HEAD.format("seed"), *rows, ""] if len(rows) > 1 else []


def glance(done: Mapping[str, Any], spread: Mapping[str, Any]) -> list[str]:
    """Every recipe at every width: the ratio, and how near to the float model's the images are."""
    widths = [bits for bits in WIDTHS if any(f"{recipe}-{bits}" in done for recipe in RECIPES)]
    lines = ["### At a glance", "", f"| recipe | {' | '.join(widths).upper()} |", "|---" * (1 + len(widths)) + "|"]
    for recipe in RECIPES:
        figures = [brief(done.get(f"{recipe}-{bits}"), spread.get(f"{recipe}-{bits}", {})) for bits in widths]
        if any(figures):
            lines.append(f"| `{recipe}` | {' | '.join(figures)} |")
    layered = [brief(done.get(f"layers-{bits}"), spread.get(f"layers-{bits}", {})) for bits in widths]
    lines += [f"| {LAYERS} | {' | '.join(layered)} |"] if any(layered) else []
    return [*lines, "", "Ratio, ± its standard error, and PSNR. Empty: not run.", ""]


def brief(cell: Mapping[str, Any] | None, spread: Mapping[str, float]) -> str:
    """A cell's ratio and PSNR; empty without a cell."""
    if cell is None:
        return ""
    scores = cell["evaluation"]
    error = f" ± {spread['error']:.3f}" if spread else ""
    return f"{scores['ratio']['fd']:.3f}{error}, {scores['paired']['psnr']:.1f} dB"


def width_table(bits: str, done: Mapping[str, Any], spread: Mapping[str, Any]) -> list[str]:
    """All figures of the recipes at a width; empty if none ran."""
    names = {f"{recipe}-{bits}": f"`{recipe}`" for recipe in RECIPES} | {f"layers-{bits}": LAYERS}
    rows = [row(text, done[name], spread.get(name, {})) for name, text in names.items() if name in done]
    return [f"### All figures, {bits.upper()}", "", HEAD.format("recipe"), *rows, ""] if rows else []


def ablation(title: str, bits: str, done: Mapping[str, Any], spread: Mapping[str, Any]) -> list[str]:
    """The whole recipe at a width, and with each part left out; empty if none was."""
    cells = {f"tcaq-{bits}": "the whole recipe", f"steps-{bits}": BY_STEPS}
    cells |= {f"{part}-{bits}": text for part, text in PARTS.items()}
    rows = [row(text, done[name], spread.get(name, {})) for name, text in cells.items() if name in done]
    if len(rows) < 2:
        return []
    there = {name: text for name, text in cells.items() if "more" in spread.get(name, {})}
    before = {name: text for name, text in there.items() if f"steps-{bits}" in done and "commit" not in done[name]}
    newer = {name: text for name, text in there.items() if name not in before}
    paired = [*above("that by steps", before, spread), *above("the whole recipe", newer, spread)]
    return [f"### {title}", "", HEAD.format("tcaq"), *rows, "", *paired]


def above(whole: str, cells: Mapping[str, str], spread: Mapping[str, Any]) -> list[str]:
    """How far ratios are above that of what cells were measured beside; empty without cells."""
    more = [f"{text} {spread[name]['more']:+.3f} ± {spread[name]['error of more']:.3f}" for name, text in cells.items()]
    return [f"Ratio above {whole}, image by image: {'; '.join(more)}.", ""] if more else []


def speed(results: Mapping[str, Any]) -> list[str]:
    """Real execution of both models, and how it changes as work grows."""
    cell = results["cifar10"]["w4a4"]
    first = cell["table"]["ours"]
    lines = [
        "## Speed, memory and size",
        "",
        f"`python benchmarks/speed.py`: `tcaq bench` on {first['processor']}, {'with' if first['vnni'] else 'without'} VNNI, "
        f"{first['threads']} threads, nothing else running; batch 8, medians of {first['settings']['repeat']} repetitions in turn. "
        "Contenders from one row of fp32 to the next ran in turn, and ratios are within such a part. Memory: peak of "
        f"loading the model and sampling one image, beyond the interpreter and its libraries. PSNR: to "
        f"the float model's images, {first['settings']['steps']} steps; with random weights it says only that nobody wins by "
        "computing something else.",
        "",
    ]
    for name, title in TITLES.items():
        for width, cell in results.get(name, {}).items():
            if "table" in cell:
                lines += [
                    f"### {title}, {CHECKPOINTS[width]}",
                    "",
                    *race(cell["table"], cell.get("memory", {"rows": []})),
                    "",
                ]
    return lines


def race(table: Mapping[str, Any], held: Mapping[str, Any]) -> list[str]:
    """A line for each contender, part after part."""
    memories = {row["name"]: row["memory"] for row in held["rows"]}
    lines = ["| model | ms a step | times fp32 | PSNR dB | memory, MiB | file, MiB |", "|---|---|---|---|---|---|"]
    for part in table.values():
        (base,) = part["rows"][0]["seconds"].values()
        for row in part["rows"]:
            if row["problem"] is None:
                (seconds,) = row["seconds"].values()
                psnr = "" if row["psnr"] is None else f"{row['psnr']:.1f}"
                memory, size = (f"{n / 2**20:.1f}" if n else "" for n in (memories.get(row["name"]), row["size"]))
                lines.append(
                    f"| {row['name']} | {1e3 * seconds:.1f} | {base / seconds:.2f} | {psnr} | {memory} | {size} |"
                )
            else:
                lines.append(f"| {row['name']} | {row['problem']} | | | | |")
    return lines


def grown(results: Mapping[str, Any]) -> list[str]:
    """The figure, and where integers stop paying."""
    models = {name: results[name]["w4a4"]["growth"] for name in TITLES if name in results}
    first = next(iter(models.values()))["batch"]
    contenders = ",".join(row["name"] for row in first["rows"])
    lines = [
        "### As work grows, W4A4",
        "",
        f"`python benchmarks/speed.py --only growth --widths w4a4 --growing {contenders} --results "
        f"benchmarks/results/growth.json`: {first['processor']}, "
        f"{'with' if first['vnni'] else 'without'} VNNI, {first['threads']} threads, nothing else running.",
        "",
        "![times as fast as fp32 over batch and size](images/growth.png)",
        "",
    ]
    for name, growth in models.items():
        for axis, curves in ratios(growth).items():
            slow = [str(number) for number, ratio in curves["integer"].items() if ratio < 1]
            where = f"does not pay at {', '.join(slow)}" if slow else "pays throughout"
            lines.append(f"- {TITLES[name]}, by {axis}: `integer` {where} ({_span(curves['integer'])} times fp32).")
    return [*lines, ""]


def _span(curve: Mapping[int, float]) -> str:
    return f"{min(curve.values()):.2f} to {max(curve.values()):.2f}"


def row(name: str, cell: Mapping[str, Any], spread: Mapping[str, float] | None = None) -> str:
    """A line of a table; spread: standard error of its ratio, if it is known."""
    error = f" ± {spread['error']:.3f}" if spread else ""
    scores = cell["evaluation"]
    pair = scores["paired"]
    # a process that was halted for hours has no time to show
    minutes = "" if cell["quantize_seconds"] is None else f"{cell['quantize_seconds'] / 60:.1f}"
    return (
        f"| {name} | {scores['quantized']['fd']:.2f} | {scores['ratio']['fd']:.3f}{error} | {scores['quantized']['kid']:.5f} "
        f"| {pair['psnr']:.2f} | {pair['ssim']:.3f} | {pair['fd_to_float']:.2f} "
        f"| {minutes} | {cell['threads']} | {where(cell)} | {cell['quantize_peak_memory'] / 2**30:.2f} "
        f"| {cell.get('commit', '')} |"
    )


def where(cell: Mapping[str, Any]) -> str:
    """What a cell was computed on: its processor's vector instructions, and what else sampled it."""
    return f"{cell['vectors']}, sampled on {cell['sampled']}" if "sampled" in cell else str(cell["vectors"])


def iterated(results: Mapping[str, Any]) -> list[str]:
    """What more iterations for each unit than the preset has are worth."""
    rows, cells = [], results["cells"]
    for name, cell in cells.items():
        count = (
            name.split("-")[1]
            if name.startswith("iterations-")
            else f"{PRESETS['full']['reconstruction']['iterations']}, `full`"
        )
        scores, seconds = cell["evaluation"], cell["quantize_seconds"]
        rows.append(
            f"| {count} | {scores['quantized']['fd']:.3f} | {scores['ratio']['fd']:.3f} ± {cell['error']:.3f} "
            f"| {scores['paired']['psnr']:.2f} | {scores['paired']['fd_to_float']:.3f} | {seconds:.0f} "
            f"| {cell['stages']['reconstruct/0']:.0f} | {cell['commit']} |"
        )
    first = next(iter(cells.values()))
    return [
        "### More iterations for each unit",
        "",
        f"`python benchmarks/iterations.py --device cuda --calibration-batch 96`: W4A4 as above, {results['num']} images, "
        f"quantized and sampled on one {first['device']}; 20 000 are the field's default. Where graphs are replayed an iteration "
        "costs little, so that what both rows share weighs most in the first; 200 iterations of all units took 308 seconds of one "
        "core of a Zen 4 in the W4A4 cell above, by which 20 000 would take eight and a half hours.",
        "",
        "| iterations | FD | ratio | PSNR dB | FD to float | quantizing, s | fits of units, s | code |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
        "",
    ]


def integers(results: Mapping[str, Any]) -> list[str]:
    """Images of integer execution against those of the fake-quantized model."""
    rows = []
    for name, cell in results["cells"].items():
        ways = [cell["distances"][execution] for execution in ("fake", "integer")]
        figures = [f"{way['ratio']:.3f}" for way in ways] + [f"{way['psnr']:.2f}" for way in ways]
        figures += [f"{cell['to fake'][other]:.1f}" for other in ("integer", "reordered")]
        rows.append(f"| {name.replace('-', ' ')} | {' | '.join(figures)} |")
    return [
        "## Integer images",
        "",
        f"`python benchmarks/integer.py`: the same checkpoints fake-quantized and in integers, {results['num']} images for the "
        f"distances, {results['pairs']} for PSNR to fake, {results['steps']} steps, seed {results['seed']}, {results['machine']}. "
        "`another order`: the fake-quantized model against itself with its sums in another order, by which the column before it "
        "can be measured.",
        "",
        "| checkpoint | ratio, fake | ratio, integer | PSNR to float, fake | PSNR to float, integer | integer to fake, dB "
        "| another order to fake, dB |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
    ]


def second(results: Mapping[str, Any], parts: Mapping[str, Any] | None, spread: Mapping[str, Any]) -> list[str]:
    """Recipes on the second model, and what each part of ours adds there."""
    how = results["protocol"]
    text = (
        f"`tcaq compare {how['model']} --guidance {how['conditions']['guidance']} --preset {how['preset']} --num {how['images']} "
        f"--steps {how['steps']}` (`make bench` has the whole command): a class-conditional latent diffusion transformer that was "
        "trained on the same data ([reference-model.md](reference-model.md)), layers quantized alike by all recipes. Processes ran "
        "beside each other, one thread each. `tcaq` is here, too, as it was before errors were weighed by band."
    )
    picture = "![float and quantized samples of the same seeds and labels](images/second-w4a4.png)"
    lines = ["## The second model, a latent DiT", "", text, "", *markdown(results).splitlines(), "", picture, ""]
    if parts is None:
        return lines
    title = f"What each part adds on the second model at W4A4, preset `{parts['preset']}`"
    return [*lines, *ablation(title, "w4a4", parts["cells"], spread)]


def costs(presets: Mapping[str, Any]) -> list[str]:
    """Time and memory of the presets."""
    rows = [
        f"| `{name}` | {cost['seconds'] / 60:.1f} | {cost['peak_memory'] / 2**30:.2f} | {cost['threads']} "
        f"| {', '.join(f'{stage} {seconds:.0f}' for stage, seconds in cost['stages'].items())} |"
        for name, cost in presets.items()
    ]
    return [
        "## What the presets cost",
        "",
        "`python benchmarks/presets.py`: the bundled model at W4A4, nothing else running. "
        f"Machine: {next(iter(presets.values()))['machine']}.",
        "",
        "| preset | minutes | peak, GiB | threads | seconds by stage |",
        "|---|---|---|---|---|",
        *rows,
        "",
    ]


if __name__ == "__main__":
    main()
