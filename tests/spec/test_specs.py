"""Every specification round-trips JSON, and wrong ones are refused with all that is wrong at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from tcaq.errors import UsageError
from tcaq.spec.base import Spec
from tcaq.spec.conditions import Conditions
from tcaq.spec.grid import AdaptiveGrid, AffineGrid, Grid, Log2Grid, UnitGrid
from tcaq.spec.plan import LayerGrids, Plan, ResolvedPlan, Rule
from tcaq.spec.recipe import Alignment, Calibration, Daq, NetworkFit, RangeSearch, Recipe, Reconstruction, Tcr
from tcaq.spec.steps import StepGroups

BITS = st.integers(2, 8)
AFFINE = st.builds(AffineGrid, bits=BITS, signed=st.booleans(), symmetric=st.booleans())
WIDER = st.sampled_from([AffineGrid(bits=4, wider=(8,)), UnitGrid(bits=2, wider=(3, 8)), Log2Grid(bits=4, wider=(6,))])
GRIDS = (
    WIDER
    | AFFINE
    | st.builds(Log2Grid, bits=BITS)
    | st.builds(UnitGrid, bits=BITS)
    | st.builds(AdaptiveGrid, bits=BITS)
)
KINDS = st.sampled_from(["conv", "linear", "scores", "mix"])
TEXT = st.text(min_size=1, max_size=8)
POSITIVE = st.integers(1, 10**6)
FRACTION = st.floats(0, 1)
ABOVE_ZERO = st.floats(0, 100, exclude_min=True)

RULES = st.builds(
    Rule,
    match=TEXT,
    kinds=st.lists(KINDS, max_size=3).map(tuple),
    weight=st.none() | AFFINE,
    input=st.none() | AFFINE,
    left=st.none() | GRIDS,
    right=st.none() | AFFINE,
    reason=TEXT,
    optional=st.booleans(),
)
LAYERS = st.builds(
    LayerGrids,
    name=TEXT,
    kind=KINDS,
    weight=st.none() | AFFINE,
    inputs=st.lists(GRIDS, max_size=2).map(tuple),
    reason=st.none() | TEXT,
)
TCR = st.builds(Tcr, percentile=FRACTION, truncate=st.floats(1, 1e6), strength=FRACTION)
DAQ = st.builds(Daq, p_min=st.floats(1e-9, 0.5))
RECONSTRUCTION = st.builds(Reconstruction, iterations=POSITIVE, power=ABOVE_ZERO, warmup=FRACTION, drop=FRACTION)
RECIPES = st.builds(
    Recipe,
    program=TEXT,
    weights=BITS,
    activations=BITS,
    step_groups=st.just("per-step") | POSITIVE,
    calibration=st.builds(Calibration, images=POSITIVE, steps=POSITIVE, batch=POSITIVE),
    ranges=st.builds(RangeSearch, weight_candidates=POSITIVE, power=ABOVE_ZERO, values=POSITIVE),
    tcr=st.none() | TCR,
    daq=st.none() | DAQ,
    reconstruction=st.none() | RECONSTRUCTION,
    alignment=st.none() | st.builds(Alignment, rounds=st.integers(0, 9), iterations=POSITIVE),
    seed=st.integers(0, 2**63),
)
GROUPS = st.builds(
    StepGroups, boundaries=st.lists(st.floats(0, 1000), max_size=9, unique=True).map(lambda b: tuple(sorted(b)))
)
PLANS = st.builds(Plan, rules=st.lists(RULES, max_size=3).map(tuple))
RESOLVED = st.builds(ResolvedPlan, layers=st.lists(LAYERS, max_size=3).map(tuple))


@settings(max_examples=40, deadline=None)
@given(GRIDS | RULES | LAYERS | RECIPES | GROUPS | PLANS | RESOLVED)
def test_json_round_trip(spec: Spec) -> None:
    assert type(spec).model_validate_json(spec.model_dump_json()) == spec


@settings(max_examples=30, deadline=None)
@given(GRIDS)
def test_a_grid_is_told_by_its_code(grid: Spec) -> None:
    again = TypeAdapter(Grid).validate_json(grid.model_dump_json())
    assert type(again) is type(grid)
    assert again == grid
    assert str(again).endswith("|".join(map(str, grid.widths)))  # type: ignore[attr-defined]


def test_a_log2_grid_that_gets_wider_gets_denser() -> None:
    grid = AdaptiveGrid(bits=4, wider=(6, 8), per_octave=2)
    assert [grid.at(bits).per_octave for bits in grid.widths] == [2, 8, 32]
    assert [str(grid.at(bits)) for bits in grid.widths] == ["daq4x2", "daq6x8", "daq8x32"]
    assert Log2Grid(bits=4, wider=(8,), per_octave=16).at(8).per_octave == 64  # the most there may be
    assert str(AffineGrid(bits=4, wider=(6, 8))) == "auint4|6|8"
    with pytest.raises(UsageError, match="must ascend from `bits`, given 4 and \\(8, 6\\)"):
        AffineGrid.parse({"bits": 4, "wider": [8, 6]}, where="grid")


def test_files_round_trip(tmp_path: Path) -> None:
    recipe = Recipe(weights=3, tcr=None, step_groups=7)
    path = tmp_path / "recipe.json"
    path.write_text(recipe.model_dump_json())
    assert Recipe.read(path) == recipe


def test_specifications_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Recipe().weights = 5


def test_all_errors_are_told_at_once() -> None:
    wrong = {
        "weights": 9,
        "activations": 1,
        "step_groups": 0,
        "colour": "blue",
        "tcr": {"percentile": 1.5, "truncate": 0.5},
        "calibration": {"images": 0},
        "ranges": {"power": float("nan")},
        "memory": float("inf"),
    }
    with pytest.raises(UsageError) as caught:
        Recipe.parse(wrong, where="recipe.json")
    message = str(caught.value)
    assert message.startswith("recipe.json: ")
    for part in (
        "weights: Input should be less than or equal to 8 (given: 9)",
        "activations: Input should be greater than or equal to 2 (given: 1)",
        "step_groups",
        "colour: Extra inputs are not permitted (given: 'blue')",
        "tcr.percentile",
        "tcr.truncate",
        "calibration.images",
        "ranges.power",
        "memory: Input should be a finite number",
    ):
        assert part in message


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 16, 4.5, "four"])
@pytest.mark.parametrize("model", [AffineGrid, Log2Grid, UnitGrid, AdaptiveGrid])
def test_bits_outside_two_to_eight_are_refused(model: type[Spec], bits: object) -> None:
    with pytest.raises(UsageError, match=r"grid: bits: .*\(given: "):
        model.parse({"bits": bits}, where="grid")


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe\x00", None])
def test_files_that_are_no_json_are_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "recipe.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"cannot read .*recipe\.json as JSON"):
        Recipe.read(path)


def test_json_that_is_no_object_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text("[1, 2]")
    with pytest.raises(UsageError, match=r"recipe\.json: value: "):
        Recipe.read(path)


def test_the_fit_of_the_whole_denoiser_decides_no_rounding() -> None:
    fit = NetworkFit(iterations=7, batch=3, inputs=9, scale_rate=0.5, bias_rate=0.25, balance="all")
    spec = fit.reconstruction()
    assert (spec.rounding_rate, spec.drop) == (0.0, 0.0)
    assert {name: getattr(spec, name) for name in fit.model_dump()} == fit.model_dump()


@pytest.mark.parametrize(("bits", "expected"), [(2, 1), (3, 1), (4, 2), (6, 8), (8, 32)])
def test_octaves_say_how_dense_a_log2_grid_is(bits: int, expected: int) -> None:
    assert Daq().per_octave(bits) == expected
    assert Daq(octaves=None).per_octave(bits) == 1
    name = f"daq{bits}" if expected == 1 else f"daq{bits}x{expected}"
    assert str(AdaptiveGrid(bits=bits, per_octave=expected)) == name


def test_a_mark_at_the_head_of_a_file_is_no_part_of_its_first_prompt(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n", encoding="utf-8-sig")
    assert Conditions.with_prompts_of(tmp_path / "prompts.txt").prompts == ("a cat",)
