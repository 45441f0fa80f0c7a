"""The shell lines of the GitHub Action, run as GitHub would."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
ACTION = ROOT / ".github" / "actions" / "gate" / "action.yml"
#: Stands in for the command, which has tests of its own: says what it was called with, and what a file tells it to.
COMMAND = """#!{python}
import json, os, pathlib, sys
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
print(sys.argv[1], "printed this")
sys.exit(int(os.environ["CODE"]) if sys.argv[1] == "compare" else 0)
"""


@pytest.fixture
def action(tmp_path: Path) -> Callable[..., tuple[int, dict[str, str]]]:
    """``action(code, model=...)``: what the first failing step exits with, and outputs; ``code`` is compare's."""
    bin = tmp_path / "bin"
    bin.mkdir()
    (bin / "compressllm").write_text(COMMAND.format(python=sys.executable))
    (bin / "compressllm").chmod(0o755)
    known = yaml.safe_load(ACTION.read_text())

    def run(code: int = 0, **given: str) -> tuple[int, dict[str, str]]:
        inputs = {name: about.get("default", "") for name, about in known["inputs"].items()} | given
        assert inputs.keys() == known["inputs"].keys()
        assert all(inputs[name] for name, about in known["inputs"].items() if about.get("required"))

        def filled(text: str) -> str:
            return re.sub(r"\$\{\{ inputs\.([a-z-]+) \}\}", lambda match: inputs[match[1]], text)

        for file in ("output", "summary"):
            (tmp_path / file).touch()
        steps = known["runs"]["steps"]
        for step in steps:
            assert "${{" not in step["run"]  # an input's text is never part of a script
            environment = os.environ | {
                "PATH": f"{bin}:{os.environ['PATH']}",
                "CALLS": str(tmp_path / "calls"),
                "CODE": str(code),
                "GITHUB_OUTPUT": str(tmp_path / "output"),
                "GITHUB_STEP_SUMMARY": str(tmp_path / "summary"),
            }
            environment |= {name: filled(value) for name, value in step["env"].items()}
            done = subprocess.run(
                ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
                env=environment, cwd=tmp_path, check=False,
            )  # fmt: skip
            if done.returncode:
                break
        output = dict(line.split("=", 1) for line in (tmp_path / "output").read_text().splitlines())
        return done.returncode, output

    return run


def calls(folder: Path) -> list[list[str]]:
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


def test_measures_and_judges(action, tmp_path):
    code, output = action(model="my model", baseline="before.json", data="eval.txt", windows="8", install="")
    assert (code, output) == (0, {"failed": "false"})
    assert calls(tmp_path) == [
        ["eval", "my model", "--data", "eval.txt", "--windows", "8", "--json"],
        ["compare", "before.json", "compressllm-gate/after.json", "--confidence", "0.95", "--junit",
         "compressllm-gate/gate.xml", "--max-ppl-increase", "2%"],
    ]  # fmt: skip
    assert (tmp_path / "compressllm-gate" / "after.json").read_text() == "eval printed this\n"
    assert "compare printed this" in (tmp_path / "summary").read_text()


def test_a_failed_gate_fails_the_step_and_says_so(action, tmp_path):
    given = {"model": "$(touch x)", "baseline": "b.json", "install": "", "results": "out"}
    code, output = action(
        1, **given, **{"max-ppl-increase": "", "max-acc-drop": "0.5", "task-files": "d", "tasks": "a,b"}
    )
    assert (code, output) == (1, {"failed": "true"})
    measured, judged = calls(tmp_path)
    assert measured == ["eval", "$(touch x)", "--tasks", "a,b", "--task-files", "d", "--json"]
    assert judged[-2:] == ["--max-acc-drop", "0.5"]
    assert "--max-ppl-increase" not in judged
    assert not (tmp_path / "x").exists()
    assert "compare printed this" in (tmp_path / "summary").read_text()


def test_bad_input_is_no_failed_gate(action):
    assert action(2, model="m", baseline="b", install="") == (2, {"failed": "false"})


def test_every_flag_is_one_of_the_command(cli_options):
    script = "".join(step["run"] for step in yaml.safe_load(ACTION.read_text())["runs"]["steps"])
    names = re.search(r"for name in ([a-z -]+);", script)[1].split()
    assert {f"--{name}" for name in names} <= cli_options("eval")
    assert {"--confidence", "--junit", "--max-ppl-increase", "--max-acc-drop"} <= cli_options("compare")


@pytest.fixture
def cli_options() -> Callable[[str], set[str]]:
    """The options of a command."""
    from typer.main import get_command

    from compressllm.cli.app import app

    return lambda name: {option for one in get_command(app).commands[name].params for option in one.opts}
