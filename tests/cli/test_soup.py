"""``compressllm soup`` on the trained tiny model."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file


@pytest.fixture
def members(cli: Callable, tiny: str, text: str, tmp_path: Path) -> list[Path]:
    """The tiny model at 2:4, once as pruned and once with its kept weights ruined."""
    run = ("--method", "magnitude", "--pattern", "2:4")
    assert cli("prune", tiny, tmp_path / "good", *run).code == 0
    ruined = tmp_path / "ruined"
    shutil.copytree(tmp_path / "good" / "model", ruined)
    tensors = load_file(ruined / "model.safetensors")
    torch.manual_seed(0)
    noisy = {name: value + 0.5 * torch.randn_like(value) * (value != 0) for name, value in tensors.items()}
    save_file(noisy, ruined / "model.safetensors", {"format": "pt"})
    return [ruined, tmp_path / "good"]


def test_uniform_soup(cli: Callable, members: list[Path], tmp_path: Path) -> None:
    done = cli("soup", *members, tmp_path / "soup")
    assert done.code == 0
    assert "uniform soup of ruined, good/model" in done.out
    assert cli("verify", tmp_path / "soup", "--pattern", "2:4").code == 0


def test_greedy_soup_leaves_out_what_hurts(cli: Callable, members: list[Path], text: str, tmp_path: Path) -> None:
    flags = ("--method", "greedy", "--data", text, "--windows", 4, "--seqlen", 64)
    done = cli("soup", *members, tmp_path / "soup", *flags, "--json")
    assert done.code == 0
    made = done.json["source"]["soup"]
    assert [one["folder"] for one in made["members"]] == ["good/model"]
    assert made["held_out"]["windows"] == 4
    assert made["loss"] == min(made["alone"].values())
    assert [step["taken"] for step in made["tried"]] == [False]
    best, soup = (load_file(folder / "model.safetensors") for folder in (members[1] / "model", tmp_path / "soup"))
    assert all(torch.equal(soup[name], value) for name, value in best.items())


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--method", "greedy"), "held-out text"),
        (("--data", "builtin"), "only method greedy looks at text"),
        (("--method", "fresh"), "uniform"),
    ],
)
def test_flags(cli: Callable, members: list[Path], tmp_path: Path, flags: tuple[str, ...], says: str) -> None:
    done = cli("soup", *members, tmp_path / "soup", *flags)
    assert done.code == 2
    assert says in done.err
    assert not (tmp_path / "soup").exists()


def test_a_soup_is_pruned_further(cli: Callable, members: list[Path], tmp_path: Path) -> None:
    """A cycle of soups: the average of one round is what the next round prunes."""
    assert cli("soup", *members, tmp_path / "soup").code == 0
    assert cli("prune", tmp_path / "soup", tmp_path / "next", "--method", "magnitude", "--pattern", "1:4").code == 0
    assert cli("verify", tmp_path / "next", "--pattern", "1:4").code == 0
    soup, further = (load_file(folder / "model.safetensors") for folder in (tmp_path / "soup", tmp_path / "next/model"))
    assert all(
        torch.equal(value[further[name] != 0], further[name][further[name] != 0]) for name, value in soup.items()
    )
