"""The model card: what is in it, and what is not known and so is not."""

import json
from pathlib import Path

import pytest
import yaml

from compressllm.export.modelcard import run_of, write_card
from compressllm.models.facts import Facts, LinearFacts
from compressllm.models.sourcecard import card_facts

PRUNE = {"stage": "prune", "config": {"method": {"wanda": {}}, "pattern": "2:4"}, "metrics": {}}
EVAL = {"stage": "eval", "config": {}, "metrics": {"perplexity": 9.5, "protocol": "some text"}}


def facts(**changes) -> Facts:
    linears = {"a": LinearFacts(pattern="2:4", shape=(8, 8)), "b": LinearFacts(pattern="2:4", shape=(16, 8))}
    whole = {"written_by": "1.2", "format": "packed", "variant": "packed", "linears": linears, "masks_sha256": "cd"}
    return Facts(**(whole | {"sha256": {"model.packed.safetensors": "ab"}} | changes))


def card(tmp_path: Path, *arguments) -> tuple[dict, str]:
    write_card(tmp_path, *arguments)
    _, head, body = (tmp_path / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), body


def test_facts_of_a_run(tmp_path: Path) -> None:
    run = {"model": "some-org/Model-1B@main", "seed": 3, "stages": [PRUNE, EVAL]}
    head, body = card(tmp_path, facts(), 0.5625, run)
    assert head == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "some-org/Model-1B",
        "tags": ["compressllm", "pruned", "sparse", "2:4"],
    }
    for wanted in (
        "# some-org/Model-1B, pruned to 2:4\n",
        "Sparse linears: 2; patterns: 2:4 (2)",
        "removed from them: 50.00%",
        "0.5625 of the dense one",
        '| prune | method {"wanda": {}}, pattern 2:4 |  |',
        "| eval |  | 9.5000 |",
        "Perplexity: some text.",
        'from_pretrained("FOLDER", variant="packed")',
        "| model.packed.safetensors | `ab` |",
        "`cd`",
    ):
        assert wanted in body, wanted


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    head, body = card(tmp_path, facts(format="dense", variant=None, linears={}, masks_sha256=None), 1.0, None)
    assert head == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["compressllm"]}
    assert "No linear is sparse" in body
    assert "How it was made" not in body
    assert "import compressllm" not in body
    assert "variant" not in body


def test_a_folder_is_no_base_model_and_its_place_is_not_told(tmp_path: Path) -> None:
    head, body = card(tmp_path, facts(), 0.5, {"model": str(tmp_path / "mine"), "stages": []})
    assert "base_model" not in head
    assert "# mine, pruned" in body
    assert str(tmp_path) not in body


def test_the_run_a_folder_lies_in_is_found(tmp_path: Path) -> None:
    """Each model with the stages up to it, and what was measured of it."""
    stages = [PRUNE | {"model": "01-prune/model"}, EVAL | {"model": None}, PRUNE | {"model": "model"}]
    (tmp_path / "manifest.json").write_text(json.dumps({"model": "demo", "stages": stages}))
    assert run_of(tmp_path / "model")["stages"] == stages
    assert run_of(tmp_path / "01-prune" / "model")["stages"] == stages[:2]
    assert run_of(tmp_path / "a-model-that-lies-there") is None
    for other in ("half of a f", "[]", "{}"):
        (tmp_path / "manifest.json").write_text(other)
        assert run_of(tmp_path / "model") is None


def test_accuracies_are_those_of_this_model(tmp_path: Path) -> None:
    def asked(**found: float) -> dict:
        metrics = {name: {"value": value, "stderr": None if name == "f1" else 0.05} for name, value in found.items()}
        return EVAL | {"metrics": {"tasks": {"arc_easy": {"metrics": metrics, "items": 40, "num_fewshot": 5}}}}

    prune = PRUNE | {"model": "model"}
    run = {"model": "demo", "stages": [asked(acc=0.9), prune, asked(acc=0.41, f1=0.3)]}
    _, body = card(tmp_path, facts(), 0.5, run)
    assert "| arc_easy | acc | 40 | 5 | 41.00 ± 5.00 |\n| arc_easy | f1 | 40 | 5 | 30.00 |\n" in body
    assert "90.00" not in body  # the dense model's
    _, body = card(tmp_path, facts(), 0.5, run | {"stages": [asked(acc=0.9), prune]})
    assert "Accuracy" not in body


def test_licence_and_base_model_of_the_source_are_passed_on(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "README.md").write_text(
        "---\nlicense: other\nlicense_name: gemma\nbase_model: [org/base]\ntags: [x]\nevil: 1\n---\n# Model\n---\n"
    )
    told = card_facts(source)
    assert told == {"license": "other", "license_name": "gemma", "base_model": "org/base"}
    head, _ = card(tmp_path, facts(source=told), 0.5625, None)
    assert (head["license"], head["license_name"], head["base_model"]) == ("other", "gemma", "org/base")
    head, _ = card(tmp_path, facts(source=told), 0.5625, {"model": "org/named", "stages": []})
    assert head["base_model"] == "org/named"
    assert card_facts(tmp_path)["license"] == "other"  # so that what is made of our own output has it too


@pytest.mark.parametrize("text", ["# no metadata", "---\n- a list\n---\n", "---\n{\n---\n", "---\nlicense: 3\n---\n"])
def test_cards_that_say_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)
    assert card_facts(tmp_path) == {}
    assert card_facts(tmp_path / "none") == {}


def test_quantised_models_say_so(tmp_path: Path) -> None:
    linears = {
        "a": LinearFacts(pattern="2:4", shape=(8, 8), scheme="int4-g128"),
        "b": LinearFacts(pattern="0.0", shape=(16, 8), scheme="int4-g128"),
    }
    head, body = card(tmp_path, facts(linears=linears), 0.195, {"model": "org/a", "stages": []})
    assert head["tags"] == ["compressllm", "pruned", "sparse", "2:4", "int4-g128"]
    assert "# org/a, pruned to 2:4, int4-g128\n" in body
    assert "rounded to int4-g128 (2 linears)" in body
    assert "Sparse linears: 1; patterns: 2:4 (1)" in body
