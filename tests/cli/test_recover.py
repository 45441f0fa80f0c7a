"""``compressllm recover`` from end to end on the trained tiny model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SHORT = ("--seqlen", 64, "--max-tokens", 12_000, "--batch-tokens", 1024, "--micro-batch", 8, "--lr", 1e-3)


@pytest.fixture
def pruned(cli: Callable[..., Any], tiny: str, text: str, tmp_path: Path) -> Path:
    flags = ("--method", "wanda", "--pattern", "2:4", "--data", text, "--samples", 8, "--seqlen", 64)
    assert cli("prune", tiny, tmp_path / "pruned", *flags).code == 0
    return tmp_path / "pruned"


def perplexity(cli: Callable[..., Any], model: object) -> float:
    data = str(Path(__file__).parent.parent / "tiny" / "eval.txt")
    return float(cli("eval", model, "--data", data, "--seqlen", 128, "--windows", 60, "--json").json["perplexity"])


def test_recovers_verifies_exports_and_reloads(
    cli: Callable[..., Any], pruned: Path, tiny: str, text: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    flags = ("--teacher", tiny, "--data", text, *SHORT)
    done = cli("recover", pruned, out, *flags, "--json")
    assert done.code == 0, done.err
    assert "tokens/s" in done.err
    metrics = done.json["stages"][0]["metrics"]
    assert metrics["tokens"] == 12 * 1024
    measured = metrics["held_out_perplexity"]
    assert measured["teacher"] < measured["after"] < measured["before"]
    assert metrics["gap_closed"] > 0.5
    assert cli("verify", out, "--pattern", "2:4").code == 0

    dense, before, after = (perplexity(cli, model) for model in (tiny, pruned, out))
    assert dense < after < before
    assert (before - after) / (before - dense) > 0.5, "most of what pruning cost on other text is won back"
    assert cli("export", out, tmp_path / "packed", "--format", "packed").code == 0
    assert perplexity(cli, tmp_path / "packed") == pytest.approx(after, rel=1e-6)

    assert cli("recover", pruned, tmp_path / "ce", "--losses", "ce=1.0", "--data", text, *SHORT).code == 0
    assert after < perplexity(cli, tmp_path / "ce"), "a teacher says more than the text"


def test_a_finished_run_is_taken_up_and_another_refused(
    cli: Callable[..., Any], one_pruned: Path, tiny: str, text: str, tmp_path: Path
) -> None:
    few = ("--teacher", tiny, "--data", text, "--seqlen", 64, "--batch-tokens", 256)
    assert cli("recover", one_pruned, tmp_path / "out", *few, "--max-tokens", 512).code == 0
    assert cli("recover", one_pruned, tmp_path / "out", *few, "--max-tokens", 512).code == 0
    other = cli("recover", one_pruned, tmp_path / "out", *few, "--max-tokens", 1024, "--lr", 0.1)
    assert other.code == 2
    assert "stages.0.recover.max_tokens: 512 then, 1024 now" in other.err
    assert "stages.0.recover.lr: 0.0003 then, 0.1 now" in other.err


def test_records_train_on_responses(cli: Callable[..., Any], one_pruned: Path, tiny: str, tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {number}.", "output": f"{number} it is."} for number in range(40)]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = (
        "--teacher",
        tiny,
        "--records",
        tmp_path / "records.jsonl",
        "--seqlen",
        64,
        "--losses",
        "ce=1,squarehead=1",
    )
    done = cli("recover", one_pruned, tmp_path / "out", *flags, "--max-tokens", 1024, "--batch-tokens", 256, "--json")
    assert done.code == 0, done.err
    data = done.json["stages"][0]["metrics"]["data"]
    assert data["used"] == 40
    assert data["tokens_with_labels"] < data["tokens_of_records"]


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """Forty records, of which a short sentence, one twice and one that is too long for 64 tokens."""
    rows = [
        {"instruction": f"Say {number}.", "output": f"{number} it is." + " So." * (number % 3)} for number in range(38)
    ]
    rows += [rows[0], {"instruction": "Say much.", "output": "much" * 100}]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "records.jsonl"


FEW = ("--seqlen", 64, "--max-tokens", 512, "--batch-tokens", 256)


def test_trains_on_the_records_it_chooses(
    cli: Callable[..., Any], one_pruned: Path, tiny: str, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPRESSLLM_CACHE", str(tmp_path / "cache"))
    flags = ("--teacher", tiny, "--records", records, *FEW)
    out = tmp_path / "out"
    done = cli("recover", one_pruned, out, *flags, "--select", "kd-gap:budget=0.25", "--json")
    assert done.code == 0, done.err
    metrics = done.json["stages"][0]["metrics"]
    assert metrics["selection"]["records"] == 38
    assert metrics["selection"]["chosen"] == metrics["data"]["used"] == 10
    assert "1 repeated" in done.err
    assert "1 longer than 64 tokens" in done.err
    chosen = [json.loads(line) for line in (out / "01-recover" / "chosen.jsonl").read_text().splitlines()]
    assert len({row["from"] for row in chosen}) == 10
    scores = [row["selection"]["score"] for row in chosen]
    assert scores == sorted(scores, reverse=True)
    assert scores[-1] > 0

    alone = cli("select", records, tmp_path / "alone.jsonl", "--teacher", tiny, "--student", one_pruned,
                "--method", "kd-gap", "--budget", "11", "--max-tokens", 64, "--dtype", "float32")  # fmt: skip
    assert alone.code == 0, alone.err
    facts = [json.loads(line)["selection"] for line in (tmp_path / "alone.jsonl").read_text().splitlines()]
    expected = [one["score"] for one in facts if one["line"] != 40][:10]
    assert scores == pytest.approx(expected, rel=1e-4), "the same records' divergences, as `select` finds them"


def test_a_finished_choice_is_not_made_again(
    cli: Callable[..., Any], one_pruned: Path, tiny: str, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compressllm.recover import loop
    from compressllm.stages import recovery

    flags = ("--teacher", tiny, "--records", records, *FEW, "--select", "random:budget=9")

    def dies(*rest: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop.Training, "_step", dies)
        assert cli("recover", one_pruned, tmp_path / "out", *flags).code == 130
    monkeypatch.setattr(recovery, "select_records", dies)
    done = cli("recover", one_pruned, tmp_path / "out", *flags, "--json")
    assert done.code == 0, done.err
    assert done.json["stages"][0]["metrics"]["data"]["used"] == 9
    records.write_text(records.read_text() + json.dumps({"instruction": "More?", "output": "More."}) + "\n")
    shutil.rmtree(tmp_path / "out" / "model")
    assert cli("recover", one_pruned, tmp_path / "again", *flags).code == 130, "other records are another choice"


def test_a_teacher_learns_the_text_first(
    cli: Callable[..., Any], one_pruned: Path, tiny: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compressllm.recover import loop
    from compressllm.stages import correction

    (tmp_path / "loud.txt").write_text(Path(text).read_text().upper())
    flags = ("--teacher", tiny, "--data", tmp_path / "loud.txt", "--seqlen", 64, "--batch-tokens", 256, "--lr", 1e-3,
             "--max-tokens", 4096, "--teacher-tokens", 2048, "--teacher-lr", 1e-3)  # fmt: skip
    whole = cli("recover", one_pruned, tmp_path / "whole", *flags, "--json")
    assert whole.code == 0, whole.err
    metrics = whole.json["stages"][0]["metrics"]
    learnt = metrics["correction"]
    assert (learnt["tokens"], learnt["lr"]) == (2048, 1e-3)
    assert learnt["held_out_perplexity"]["after"] < 0.8 * learnt["held_out_perplexity"]["before"]
    student = metrics["held_out_perplexity"]
    assert student["teacher"] == pytest.approx(learnt["held_out_perplexity"]["after"], rel=1e-5), "the same windows"
    assert student["after"] < learnt["held_out_perplexity"]["before"], "better than the dense model was"
    assert not (tmp_path / "whole" / "01-recover" / "teacher").exists()
    assert cli("verify", tmp_path / "whole", "--pattern", "2:4").code == 0

    step = loop.Training._step

    def stops_at(number: int) -> Callable[..., Any]:
        calls = iter(range(number))

        def stops(*rest: Any) -> Any:
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return step(*rest)

        return stops

    with monkeypatch.context() as patch:
        patch.setattr(loop.Training, "_step", stops_at(5))  # in the teacher's training
        assert cli("recover", one_pruned, tmp_path / "out", *flags).code == 130
        patch.setattr(loop.Training, "_step", stops_at(9))  # it goes on after 5 of its 8, and the student's begins
        assert cli("recover", one_pruned, tmp_path / "out", *flags).code == 130
    assert (tmp_path / "out" / "01-recover" / "teacher" / "model").exists()
    told = tmp_path / "out" / "01-recover" / "teacher" / "corrected.json"
    whole_file = told.read_text()
    told.write_text(whole_file[:40])
    damaged = cli("recover", one_pruned, tmp_path / "out", *flags)
    assert damaged.code == 2
    assert "corrected.json: is damaged" in damaged.err
    told.write_text(whole_file)
    with monkeypatch.context() as patch:
        patch.setattr(correction, "recover_model", None)
        again = cli("recover", one_pruned, tmp_path / "out", *flags, "--json")
    assert again.code == 0, again.err
    assert again.json["stages"][0]["metrics"]["correction"]["held_out_perplexity"] == learnt["held_out_perplexity"]
    same = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert same[0] == same[1]
    assert not (tmp_path / "out" / "01-recover" / "teacher").exists()


def test_a_cached_teacher_answers_once(
    cli: Callable[..., Any], one_pruned: Path, tiny: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPRESSLLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "some.txt").write_text(Path(text).read_text()[:4000])
    flags = ("--teacher", tiny, "--data", tmp_path / "some.txt", "--seqlen", 64, "--teacher-cache", 32)
    few = ("--max-tokens", 512, "--batch-tokens", 256)
    assert cli("recover", one_pruned, tmp_path / "one", *flags, *few).code == 0
    made = sorted(path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors"))
    assert made
    assert cli("recover", one_pruned, tmp_path / "two", *flags, *few, "--seed", 1).code == 0
    assert made == sorted(path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors"))


def test_a_cycle_of_sparse_soups(cli: Callable[..., Any], tiny: str, text: str, tmp_path: Path) -> None:
    """Prune, recover twice from there, average, prune the average further: as docs/recovery.md has it."""
    prune = ("--method", "wanda", "--data", text, "--samples", 4, "--seqlen", 64)
    assert cli("prune", tiny, tmp_path / "first", *prune, "--pattern", "0.3").code == 0
    for seed in (0, 1):
        flags = ("--teacher", tiny, "--data", text, *FEW, "--seed", seed)
        assert cli("recover", tmp_path / "first", tmp_path / str(seed), *flags).code == 0
    assert cli("soup", tmp_path / "0", tmp_path / "1", tmp_path / "soup").code == 0
    assert cli("verify", tmp_path / "soup", "--pattern", "0.3").code == 0
    done = cli("prune", tmp_path / "soup", tmp_path / "second", *prune, "--pattern", "0.5", "--json")
    assert done.code == 0, done.err
    assert done.json["stages"][0]["metrics"]["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert cli("verify", tmp_path / "second", "--pattern", "0.5").code == 0


def test_unusable_records_teachers_and_masks_are_refused(
    cli: Callable[..., Any], one_pruned: Path, tiny: str, records: Path, tmp_path: Path
) -> None:
    """What a mistaken file or model comes to: one line, and no run folder."""
    strange = tmp_path / "strange"
    shutil.copytree(tiny, strange)
    tokenizer = json.loads((strange / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, other = sorted(vocabulary, key=vocabulary.__getitem__)[70:72]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (strange / "tokenizer.json").write_text(json.dumps(tokenizer))
    masked = tmp_path / "masked"
    shutil.copytree(one_pruned, masked)
    (masked / "masks.safetensors").write_bytes(b"no masks")
    (tmp_path / "none.jsonl").write_text("")
    cases = (
        (one_pruned, ("--teacher", strange, *FEW), "give a teacher of the same tokenizer"),
        (one_pruned, ("--teacher", tiny, "--records", records, "--seqlen", 8), "can be used, at least 2 are needed"),
        (one_pruned, ("--teacher", tiny, "--records", tmp_path / "none.jsonl", *FEW), "0 records can be used"),
        (one_pruned, ("--teacher", tiny, "--records", tmp_path / "none.jsonl", "--select", "random", *FEW),
         "no record can be used"),
        (masked, ("--teacher", tiny, *FEW), "masks.safetensors"),
    )  # fmt: skip
    for student, flags, says in cases:
        done = cli("recover", student, tmp_path / "out", *flags)
        errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
        assert (done.code, len(errors)) == (2, 1), done.err
        assert says in errors[0], errors[0]
        assert not (tmp_path / "out").exists()


def test_budget_check_says_how_far_decay_reaches(cli: Callable[..., Any], tiny: str, tmp_path: Path) -> None:
    flags = ("--losses", "ce=1", "--masking", "ast", "--pattern", "2:4", "--batch-tokens", 512, "--budget-check")
    short = cli("recover", tiny, tmp_path / "out", *flags, "--max-tokens", 2048, "--json")
    assert short.code == 0, short.err
    assert short.json["headroom"] == pytest.approx(short.json["reachable"] / short.json["masked_mean"])
    assert "train longer" in short.json["warning"]
    long = cli("recover", tiny, tmp_path / "out", *flags, "--max-tokens", 2_000_000, "--json").json
    assert long["warning"] is None
    assert long["reachable"] > 100 * short.json["reachable"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ((), "losses kl=1.0 need a teacher"),
        (("--losses", "lk=1"), "unknown loss 'lk'; did you mean 'kl'"),
        (("--losses", "ce=1", "--masking", "moving"), "masking"),
        (("--losses", "ce=1", "--train", "masklroa"), "unknown adapter 'masklroa'; did you mean 'masklora'"),
        (("--losses", "ce=1", "--train", "masklora", "--masking", "ast"), "train: masklora holds masks as they are"),
        (("--losses", "ce=1", "--data", "nothing.txt"), "nothing.txt: does not exist"),
        (("--losses", "ce=1", "--records", "nothing.jsonl"), "nothing.jsonl does not exist"),
        (("--losses", "ce=1", "--select", "random"), "random chooses among records; give records"),
        (("--losses", "ce=1", "--records", "x", "--select", "kd-gap"), "give that as teacher"),
        (("--losses", "ce=1", "--records", "x", "--select", "radnom"), "did you mean 'random'"),
        (("--losses", "ce=1", "--records", "x", "--select", "random:0.1"), "'0.1' has no value"),
        (("--losses", "ce=1", "--mixture", "0.5,0.5"), "mixture has 2 shares for 1 sources"),
        (("--losses", "ce=1", "--seqlen", "100000"), "seqlen 100000"),
        (("--losses", "ce=1", "--teacher-tokens", "1000"), "there is no teacher to train"),
        (("--losses", "ce=1", "--pattern", "1:4"), "breaks 1:4"),
        (("--losses", "ce=1", "--sharding", "fsdp2"), "fsdp2 needs several processes"),
        (("--teacher", "./nowhere", "--seqlen", "64"), "nowhere: does not exist"),
    ],
)
def test_mistakes_are_one_line(
    cli: Callable[..., Any], one_pruned: Path, tmp_path: Path, flags: tuple[str, ...], says: str
) -> None:
    done = cli("recover", one_pruned, tmp_path / "out", *flags)
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert done.code == 2, done
    assert len(errors) == 1, done.err
    assert says in errors[0], errors[0]
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def one_pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with its smallest weights zeroed, made once."""
    import torch
    from safetensors.torch import load_file, save_file

    from compressllm.core.pattern import NM

    folder = tmp_path_factory.mktemp("pruned") / "model"
    shutil.copytree(Path(__file__).parent.parent / "tiny" / "model", folder)
    tensors = load_file(folder / "model.safetensors")
    for name, weight in tensors.items():
        if name.endswith("_proj.weight"):
            tensors[name] = torch.where(NM(2, 4).keep(weight.abs()), weight, 0.0)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_an_empty_text_is_refused(cli: Callable[..., Any], one_pruned: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("  \n")
    done = cli(
        "recover", one_pruned, tmp_path / "out", "--losses", "ce=1", "--data", tmp_path / "empty.txt", "--seqlen", 64
    )
    assert done.code == 2
    assert "empty.txt" in done.err
    assert not (tmp_path / "out").exists()


def test_flat_parameters_are_refused(
    cli: Callable[..., Any], one_pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    done = cli("recover", one_pruned, tmp_path / "out", "--losses", "ce=1")
    assert done.code == 2
    assert "FSDP1 flattens parameters away from their masks" in done.err
