import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from compressllm.core.errors import FormatError, RecipeError, RunError
from compressllm.core.pattern import NM, Unstructured
from compressllm.core.run import Run
from compressllm.eval.config import EvalConfig
from compressllm.models.bundle import open_bundle
from compressllm.prune.config import PruneConfig
from compressllm.prune.model import prune_model
from compressllm.stages import sweep
from compressllm.stages.curve import sweep_svg
from compressllm.stages.evaluate import measure
from compressllm.stages.folder import lock_folder
from compressllm.stages.recipe import make_config
from compressllm.stages.sweep import find_knees, prune_config, sweep_model
from compressllm.stages.sweepconfig import SweepConfig, parse_points

TINY = Path(__file__).parents[2] / "tiny"
EVALUATION = EvalConfig(source=str(TINY / "eval.txt"), seqlen=64, windows=4, backend="dense")
SVG = "{http://www.w3.org/2000/svg}"


def settings(**more: Any) -> SweepConfig:
    return SweepConfig(**{"points": "0.3,2:4,0.8", "evaluation": EVALUATION} | more)


def same(config: SweepConfig, out: Path, **more: Any) -> dict[str, Any]:
    return sweep_model(str(TINY / "model"), config, out, **more)


def stop_at(point: int) -> Any:
    """Progress that breaks off in a point's pruning."""
    begun = 0

    def show(items: Any, total: int, label: str) -> Iterator[Any]:
        nonlocal begun
        begun += label.endswith(": pruning")
        for index, item in enumerate(items):
            if label.endswith(": pruning") and begun == point and index == 2:
                raise KeyboardInterrupt
            yield item

    return show


def timeless(result: dict[str, Any]) -> dict[str, Any]:
    points = [{key: value for key, value in point.items() if key != "seconds"} for point in result["points"]]
    return {key: result[key] for key in ("sweep", "protocol", "knee")} | {"points": points}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    same(settings(), out)
    return out


def test_every_point_is_what_pruning_and_measuring_gives(whole: Path, tmp_path: Path) -> None:
    result = json.loads((whole / "sweep.json").read_text())
    assert [point["pattern"] for point in result["points"]] == ["dense", "0.3", "2:4", "0.8"]
    assert [point["asked_sparsity"] for point in result["points"]] == pytest.approx([0.0, 0.3, 0.5, 0.8])
    assert [point["sparsity"] for point in result["points"]] == pytest.approx([0.0, 0.3, 0.5, 0.8], abs=1e-4)
    run = Run(folder=tmp_path)
    config = PruneConfig(method="magnitude", pattern="0.8/layer", allocation="global")
    pruned = prune_model(open_bundle(str(TINY / "model")), config, run)
    assert result["points"][3]["masks_sha256"] == pruned.masks.sha256()
    for bundle, point in ((open_bundle(str(TINY / "model")), 0), (pruned, 3)):
        assert result["points"][point]["nll"] == measure(bundle, EVALUATION, Run())["nll"]
    assert result["points"][0]["nll"] < result["points"][1]["nll"] < result["points"][3]["nll"]
    assert "4 windows" in result["protocol"]["protocol"]
    assert result["environment"]["versions"]
    assert result["finished"]
    assert sorted(path.name for path in whole.iterdir()) == ["sweep.json", "sweep.svg"]


def test_one_checkpoint_is_on_the_disk_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = []

    def watch(*args: Any) -> dict[str, Any]:
        held.append(sorted(path.parent.name for path in tmp_path.glob("out/*/model")))
        return measure(*args)

    monkeypatch.setattr(sweep, "measure", watch)
    same(settings(points="0.3,0.8"), tmp_path / "out")
    assert held == [[], ["point-01"], ["point-02"]]


def test_a_sweep_that_was_stopped_goes_on(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        same(settings(), tmp_path / "out", show=stop_at(2))
    assert len(json.loads((tmp_path / "out/sweep.json").read_text())["points"]) == 2
    assert not (tmp_path / "out/sweep.svg").exists()
    measured = []
    monkeypatch.setattr(sweep, "measure", lambda *args: measured.append(args) or measure(*args))
    result = same(settings(), tmp_path / "out")
    assert len(measured) == 2
    assert timeless(result) == timeless(json.loads((whole / "sweep.json").read_text()))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["sweep.json", "sweep.svg"]
    assert (tmp_path / "out/sweep.svg").read_bytes() == (whole / "sweep.svg").read_bytes()
    assert same(settings(), tmp_path / "out") == result
    assert len(measured) == 2


def test_a_point_that_was_noted_but_not_removed_is_removed(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "out")
    (tmp_path / "out" / "point-02" / "model").mkdir(parents=True)
    same(settings(), tmp_path / "out")
    assert not (tmp_path / "out" / "point-02").exists()


@pytest.mark.parametrize(
    ("more", "seed", "changed"),
    [({"points": "0.3,2:4"}, 0, "config"), ({"rise": 0.02}, 0, "config"), ({}, 1, "seed")],
)
def test_another_sweep_in_the_folder_is_refused(whole: Path, more: dict[str, Any], seed: int, changed: str) -> None:
    before = (whole / "sweep.json").read_bytes()
    with pytest.raises(RunError, match=f"holds a sweep with another {changed}; give a new folder"):
        same(settings(**more), whole, seed=seed)
    assert (whole / "sweep.json").read_bytes() == before


def test_a_folder_with_anything_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match=r"holds notes\.txt and no sweep; give a new or empty folder"):
        same(settings(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(RunError, match=r"sweep\.json: is damaged"):
        same(settings(), tmp_path)


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    with lock_folder(tmp_path / "out"), pytest.raises(RunError, match="is in use by process"):
        same(settings(), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_sweep_that_cannot_begin_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="matches no linear"):
        same(settings(points="0.3", skip=("nothing",)), tmp_path / "a")
    assert (tmp_path / "a" / "sweep.json").exists()  # the dense point stands
    with pytest.raises(FormatError):
        sweep_model(str(tmp_path / "no-model"), settings(), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_another_evaluation_text_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    shutil.copy(TINY / "eval.txt", text)
    config = settings(evaluation=EVALUATION.model_copy(update={"source": str(text)}))
    with pytest.raises(KeyboardInterrupt):
        same(config, tmp_path / "out", show=stop_at(1))
    text.write_text(text.read_text()[::-1])
    with pytest.raises(RunError, match="begun with another evaluation text"):
        same(config, tmp_path / "out")


# --- settings ---


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ("0:0.9:0.1", [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]),
        ("0.5:0.5:0.1", [0.5]),
        ("0.1:0.45:0.1", [0.1, 0.2, 0.3, 0.4]),
        ("10%, 0.5", [0.1, 0.5]),
    ],
)
def test_ranges_and_lists(text: str, points: list[float]) -> None:
    assert parse_points(text) == [Unstructured(fraction) for fraction in points]


def test_patterns_may_be_among_the_points() -> None:
    assert SweepConfig(points="0:0.4:0.2, 2:4,0.2,4:8").points == (
        Unstructured(0.2), Unstructured(0.4), NM(2, 4), NM(4, 8),
    )  # fmt: skip
    assert SweepConfig(points=[0.3, "2:4"]).points == (Unstructured(0.3), NM(2, 4))
    assert len(SweepConfig().points) == 9
    config = SweepConfig(points="0.3,2:4")
    assert SweepConfig(**config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"points": "0.9:0:0.1"}, "points: 0.9:0:0.1: is no range"),
        ({"points": "0:0.9:0"}, "is no range"),
        ({"points": "0:1:0.0001"}, "is no range of at most 1000"),
        ({"points": "0"}, "names no sparsity above 0"),
        ({"points": ""}, "names no sparsity above 0"),
        ({"points": "1.2"}, "outside 0 to 1"),
        ({"points": "half"}, "cannot read pattern 'half'"),
        ({"points": "0.5/row"}, "give the fraction alone"),
        ({"method": "wanda", "group": "model"}, "group model is one threshold on magnitude"),
        ({"group": "model", "allocation": "owl"}, "leaves nothing to allocate"),
        ({"rise": -1}, "rise"),
    ],
)
def test_settings_that_make_no_sense_are_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        make_config(SweepConfig, fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "pattern", "allocation"),
    [
        ({}, "0.3/layer", "global"),
        ({"group": "row"}, "0.3/row", "uniform"),
        ({"group": "layer"}, "0.3/layer", "uniform"),
        ({"method": "wanda"}, "0.3", "uniform"),
        ({"allocation": "owl"}, "0.3", "owl"),
    ],
)
def test_where_scores_compete(fields: dict[str, Any], pattern: str, allocation: str) -> None:
    config = prune_config(SweepConfig(points="0.3,2:4", **fields), Unstructured(0.3))
    assert (str(config.pattern), config.allocation) == (pattern, allocation)
    config = prune_config(SweepConfig(points="0.3,2:4", **fields), NM(2, 4))
    assert (str(config.pattern), config.allocation) == ("2:4", "uniform")


# --- knees and the curve ---


def point(pattern: str, sparsity: float, nll: float) -> dict[str, Any]:
    perplexity = math.exp(nll) if nll < 700 else None
    return {"pattern": pattern, "sparsity": sparsity, "nll": nll, "perplexity": perplexity}


POINTS = [
    point("dense", 0.0, 2.0),
    point("0.4/layer", 0.4, 2.019),
    point("0.2/layer", 0.2, 2.005),
    point("2:4", 0.5, 2.0199),
    point("0.6/layer", 0.6, 2.4),
    point("0.8/layer", 0.8, 800.0),
]


def test_knees_by_loss_by_perplexity_and_by_the_chord() -> None:
    knee = find_knees(POINTS, 0.01)
    assert knee["loss"]["pattern"] == "2:4"
    assert knee["perplexity"]["pattern"] == "0.2/layer"
    assert knee["chord"]["pattern"] == "0.6/layer"  # N:M is not on the curve
    assert find_knees(POINTS[:2], 0.01)["chord"] is None


@pytest.mark.parametrize("points", [POINTS, POINTS[:5], POINTS[:1], [point("dense", 0.0, 0.0), point("1.0", 1.0, 0.0)]])
def test_the_curve_is_well_formed_and_holds_every_point(points: list[dict[str, Any]]) -> None:
    root = ElementTree.fromstring(sweep_svg(points, find_knees(points, 0.01), "a <model> & its curve"))
    assert root.tag == f"{SVG}svg"
    circles = [one for one in root.iter(f"{SVG}circle") if one.get("class") == "point"]
    assert len(circles) == sum(":" not in one["pattern"] for one in points)
    assert sum(one.get("class") == "other" for one in root.iter(f"{SVG}path")) == len(points) - len(circles)
    across = [float(one.get("cx", "nan")) for one in circles]
    order = sorted(range(len(circles)), key=across.__getitem__)
    plain = [one["sparsity"] for one in points if ":" not in one["pattern"]]
    assert order == sorted(range(len(plain)), key=plain.__getitem__)
    texts = ["".join(one.itertext()) for one in root.iter(f"{SVG}text")]
    assert "a <model> & its curve" in texts
    assert any("perplexity" in text for text in texts)
    assert any("weights removed" in text for text in texts)
    assert any("knee by loss" in text for text in texts)
    assert "prefers-color-scheme: dark" in (root.findtext(f"{SVG}style") or "")
    _, _, width, height = map(float, root.get("viewBox", "").split())
    for one in circles:
        assert 0 < float(one.get("cx", "nan")) < width
        assert 0 < float(one.get("cy", "nan")) < height
