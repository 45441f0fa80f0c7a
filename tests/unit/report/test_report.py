"""The page of a run."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from compressllm.core.errors import RunError
from compressllm.report.content import report_title, sections_of
from compressllm.report.html import to_html
from compressllm.report.layers import heat_cells
from compressllm.report.markdown import to_markdown
from compressllm.report.picture import Curve, heat_svg, lines_svg, round_ticks
from compressllm.report.record import read_run

VOID = {"meta"}


class Balanced(HTMLParser):
    """Fails on a tag that is not closed, and keeps what a test looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.words: list[str] = []

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        assert not {"src", "srcset", "onclick"} & named.keys(), tag
        assert tag not in {"script", "link", "img", "iframe"}
        if "id" in named:
            assert named["id"] not in self.ids
            self.ids.add(named["id"])
        if "href" in named:
            self.links.add(named["href"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def page_of(folder: Path) -> tuple[str, Balanced]:
    record = read_run(folder)
    html = to_html(report_title(record), sections_of(record))
    parser = Balanced()
    parser.feed(html)
    assert not parser.open
    return html, parser


def test_page_is_whole_and_needs_nothing_else(run_folder):
    html, page = page_of(run_folder)
    assert page.links
    assert {link.removeprefix("#") for link in page.links} <= page.ids  # every link leads to a section of the page
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", html)
    assert "width=device-width" in html
    assert "prefers-color-scheme: dark" in html
    words = " ".join(page.words)
    for wanted in (
        "4.928 → 5.447",  # perplexity of the first and the last eval
        "+10.52%",
        "4.0 MB → 2.5 MB",
        "wanda (power 0.5)",
        "model.layers.4.mlp.down_proj",
        "<b>few</b> tokens",  # as words, not as a tag
        "model: tiny/model  # <made up>",
        "ef" * 32,
        "2.13.0",
    ):
        assert wanted in words, wanted
    assert words.count("Relative output error") == 1


def test_pictures_have_their_numbers_in_tables(run_folder):
    sections = sections_of(read_run(run_folder))
    drawn = [section for section in sections if section.pictures]
    assert [len(section.pictures) for section in drawn] == [3, 4]  # sparsity, error, seconds; four kinds of curves
    assert all(section.tables for section in drawn)
    for section in drawn:
        for picture in section.pictures:
            ElementTree.fromstring(picture.svg)  # well-formed
    (table,) = drawn[1].tables
    assert table.header[:2] == ["step", "held out nll"]
    assert all(len(row) == len(table.header) for row in table.rows)
    assert table.rows[-1][0] == "40"  # the last step is there, and the line that was cut short is not


def test_markdown_has_the_same_tables(run_folder):
    record = read_run(run_folder)
    text = to_markdown(report_title(record), sections_of(record))
    assert text.startswith("# compressllm: run\n")
    assert "| prune: wanda (power 0.5), 2:4 | 20 | 50 % |" in text
    assert "prune: &lt;b>few&lt;/b> tokens &amp; a | bar" in text
    assert "<svg" not in text
    widths = [line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("| model.layers.")]
    assert len(set(widths[:20])) == 1


CLUSTERS = [
    {"cluster": at, "records": 9, "budget": 3 + at, "degradation": 0.01 * at, "phrases": [f"sorting <{at}>", "lists"]}
    for at in range(2)
]


def test_a_choice_of_records_has_its_map_and_its_budget(run_folder):
    places = {"places": [[0.1, 0.2], [0.3, 0.9], [0.5, 0.5]], "clusters": [0, 1, 1]}
    report = {"clusters": CLUSTERS, "budget": 7, "map": places}
    (run_folder / "chosen.report.json").write_text(json.dumps(report))
    html, page = page_of(run_folder)
    section = next(one for one in sections_of(read_run(run_folder)) if one.title.startswith("Training records"))
    drawn, budget = (ElementTree.fromstring(picture.svg) for picture in section.pictures)
    points = [one for one in drawn.iter("{http://www.w3.org/2000/svg}circle") if one.get("r") == "2.2"]
    assert len(points) == 3
    assert points[0].get("fill") != points[1].get("fill") == points[2].get("fill")  # by degradation
    assert "4 of 9 (44%), 0.0100" in "".join(budget.itertext())
    assert "sorting <1>, lists" in " ".join(page.words)
    assert "<1>" not in html


def tradeoff(kind: str, density: float, **more) -> dict:
    row = {"kind": kind, "density": density, "effective_density": density, "quality": density, "similarity": density}
    return row | {"exact_match": None, "advance_length": None, "speed_ratio": 2 - density, "perplexity": None} | more


def test_contextual_curves_end_in_the_dense_model(run_folder):
    path = run_folder / "manifest.json"
    found = json.loads(path.read_text())
    rows = [
        tradeoff("dense", 1.0, quality=0.9, perplexity=5.0),
        tradeoff("sparse", 0.5, perplexity=8.0),
        tradeoff("sparse", 0.25, perplexity=20.0),
        tradeoff("corrected", 0.5, effective_density=0.7, quality=0.85, advance_length=9.5),
    ]
    stage = {"stage": "contextual", "config": {"selector": {"griffin": {}}}, "metrics": {"tradeoff": rows, "rule": "r"}}
    found["stages"].append(found["stages"][0] | stage)
    path.write_text(json.dumps(found))
    section = next(one for one in sections_of(read_run(run_folder)) if one.title.startswith("Few neurons"))
    assert section.title == "Few neurons a token, stage 6: contextual: griffin"
    assert len(section.pictures) == 4  # quality, likeness, perplexity, speed
    quality, _, perplexity, _ = (ElementTree.fromstring(picture.svg) for picture in section.pictures)
    assert [len(line.get("points").split()) for line in quality.iter("polyline")] == [3, 2]  # sparse and corrected
    assert len(list(perplexity.iter("polyline"))) == 1
    assert len(section.tables[0].rows) == 4
    assert "exact match" not in section.tables[0].header  # of which nothing is known


def task(value: float, items: str = "ab") -> dict:
    metrics = {"acc": {"value": value, "stderr": 0.05}, "f1": {"value": 0.25, "stderr": None}}
    return {"metrics": metrics, "items": 40, "num_fewshot": 0, "items_sha256": items * 32}


def test_accuracies_are_told_stage_by_stage(run_folder):
    path = run_folder / "manifest.json"
    found = json.loads(path.read_text())
    found["stages"][0]["metrics"]["tasks"] = {"arc": task(0.5), "piqa": task(0.7), "copa": task(0.9)}
    found["stages"][-1]["metrics"]["tasks"] = {"arc": task(0.4), "piqa": task(0.6)}
    path.write_text(json.dumps(found))
    summary, section, *_ = sections_of(read_run(run_folder))
    assert ("Mean accuracy, 2 tasks", "60 % → 50 %") in summary.cards
    (table,) = section.tables
    assert table.header == ("task", "metric", "asked", "stage 1", "stage 5")
    assert [row[0] + row[1] for row in table.rows] == ["arcacc", "arcf1", "piqaacc", "piqaf1", "copaacc", "copaf1"]
    assert table.rows[0][3:] == ("50.00 ± 5.00", "40.00 ± 5.00")
    assert table.rows[1][3:] == ("25.00", "25.00")
    assert table.rows[4][3:] == ("90.00 ± 5.00", "—")


def test_accuracies_on_other_items_are_not_compared(run_folder):
    path = run_folder / "manifest.json"
    found = json.loads(path.read_text())
    found["stages"][0]["metrics"]["tasks"] = {"arc": task(0.5)}
    found["stages"][-1]["metrics"]["tasks"] = {"arc": task(0.4, items="cd")}
    path.write_text(json.dumps(found))
    summary, section, *_ = sections_of(read_run(run_folder))
    assert ("Accuracy, arc", "40 %") in summary.cards
    assert [row[3:] for row in section.tables[0].rows[::2]] == [("50.00 ± 5.00", "—"), ("—", "40.00 ± 5.00")]


def test_quantising_is_told(run_folder):
    path = run_folder / "manifest.json"
    found = json.loads(path.read_text())
    rows = [{"linear": f"model.layers.{at}.mlp.up_proj", "tokens": 9, "error": 0.01 * (at + 1)} for at in range(3)]
    stage = {"stage": "quantize", "config": {"method": "gptq", "scheme": "int4-g128"}, "linears": rows}
    found["stages"].append(found["stages"][0] | stage | {"metrics": {"scheme": "int4-g128", "linears": 3}})
    path.write_text(json.dumps(found))
    sections = sections_of(read_run(run_folder))
    section = next(one for one in sections if one.title == "Layers, stage 6: quantize: gptq, int4-g128")
    assert "block 2, up_proj: 0.03" in section.pictures[0].svg
    assert ("Weights rounded to", "int4-g128") in sections[0].cards


def test_sweeps_benches_and_selections_are_shown(run_folder, sweep, tmp_path):
    results = Path(__file__).parents[3] / "benchmarks" / "results" / "bench_smollm2_135m.json"
    shutil.copy(results, run_folder / "bench.json")
    shutil.copy(results.with_name("kernels_cpu.json"), run_folder / "linears.json")
    (run_folder / "chosen.report.json").write_text(
        json.dumps({"clusters": [{"cluster": 0, "records": 9, "phrases": ["sorting", "lists"]}], "budget": 5})
    )
    clusters = [{"cluster": 0, "records": 7, "budget": 4, "degradation": 0.5, "phrases": ["bridges"]}]
    chosen = {"clusters": clusters, "budget": 4, "map": {"places": [[0.1, 0.2], [0.3, 0.4]], "clusters": [0, 0]}}
    (run_folder / "03-recover" / "chosen.report.json").write_text(json.dumps(chosen))
    (run_folder / "anything.json").write_text("[1, 2]")
    (run_folder / "sweep.json").write_text(json.dumps(sweep))
    words = " ".join(page_of(run_folder)[1].words)
    for wanted in (
        "Knee by loss: 0.3, 30 % removed",
        "tokens a second",
        "4096x4096 int4 native",
        "sorting, lists",
        "5 records were chosen",
        "4 of 7 (57%)",
    ):
        assert wanted in words, wanted
    alone = tmp_path / "sweep"
    alone.mkdir()
    (alone / "sweep.json").write_text(json.dumps(sweep))
    assert [section.title for section in sections_of(read_run(alone))] == ["Sweep", "Environment"]


def test_unfinished_and_empty_runs(run_folder):
    path = run_folder / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"finished": None}))
    assert "This run is not finished." in " ".join(page_of(run_folder)[1].words)
    path.write_text(json.dumps(manifest | {"stages": []}))
    assert "No stage of this run is finished." in " ".join(page_of(run_folder)[1].words)


@pytest.mark.parametrize("text", ["[]", "{}", '{"stages": 3}', "half of a f"])
def test_damaged_folders_are_refused(tmp_path, text):
    with pytest.raises(RunError, match="is no run folder"):
        read_run(tmp_path)
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(RunError, match=r"manifest\.json"):
        read_run(tmp_path)


def test_heat_cells_by_block_and_kind():
    values = {
        "model.layers.0.self_attn.q_proj": 1.0,
        "model.layers.0.mlp.experts.0.up_proj": 2.0,
        "model.layers.0.mlp.experts.1.up_proj": 4.0,
        "model.layers.1.self_attn.q_proj": float("nan"),
        "model.layers.1.mlp.experts.0.up_proj": None,
        "lm_head": 1.0,
    }
    assert heat_cells(values) == {(0, "q_proj"): 1.0, (0, "up_proj"): 3.0}
    twice = heat_cells({"h.3.attn.c_proj": 1.0, "h.3.mlp.c_proj": 2.0})
    assert twice == {(3, "attn.c_proj"): 1.0, (3, "mlp.c_proj"): 2.0}  # one last word for two kinds: both in full


def test_heat_is_stronger_where_values_are_larger():
    root = ElementTree.fromstring(heat_svg({(0, "a"): 1.0, (1, "a"): 3.0, (1, "b"): 2.0}, "t < u"))
    found = {rect.find("title").text: float(rect.get("fill-opacity")) for rect in root.iter("rect")}
    assert found == pytest.approx({"block 0, a: 1": 0.06, "block 1, a: 3": 1.0, "block 1, b: 2": 0.53})
    same = ElementTree.fromstring(heat_svg({(0, "a"): 0.5, (1, "a"): 0.5}, "t"))
    assert {rect.get("fill-opacity") for rect in same.iter("rect")} == {"0.500"}


def test_lines_go_from_corner_to_corner():
    root = ElementTree.fromstring(
        lines_svg([Curve("up", [(0, 0.0), (10, 4.0)]), Curve("one", [(5, 2.0)])], "t", "step")
    )
    (joined,) = root.iter("polyline")
    assert joined.get("points") == "52.0,192.0 348.0,46.0"
    (point,) = root.iter("circle")
    assert (point.get("cx"), point.get("cy")) == ("200.0", "119.0")


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (0.1, 9.7), (4.8, 5.2), (-1e-5, 3e-5), (3.0, 3.0), (0.0, 0.0), (1e-9, 1e9)]
)
def test_ticks_are_few_and_hold_the_range(low, high):
    ticks = round_ticks(low, high)
    assert 2 <= len(ticks) <= 7
    assert ticks[0] <= low + 1e-12
    assert ticks[-1] >= high - 1e-12
    assert ticks == sorted(set(ticks))


def test_report_imports_no_torch():
    rooms = ", ".join(f"compressllm.report.{name}" for name in ("content", "compare", "ci", "html", "markdown"))
    code = f"import sys, {rooms}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
