"""A teacher's answers on disk: right, whole or resumed, and never those of something else."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from compressllm.core.errors import FormatError, RecipeError, RunError
from compressllm.core.run import Run
from compressllm.models.bundle import Bundle, open_bundle
from compressllm.recover import teachercache
from compressllm.recover.conversation import Encoded
from compressllm.recover.guide import CacheOptions, make_guide
from compressllm.recover.head import Head, head_of, hidden_states
from compressllm.recover.headchunks import TeacherTopK
from compressllm.recover.headloss import head_loss
from compressllm.recover.losses import LossWeights
from compressllm.recover.taskdata import PaddedRows
from compressllm.recover.teacher import ResidentTeacher
from compressllm.recover.teachercache import TeacherCache, open_cache
from compressllm.recover.textdata import TextRows
from compressllm.recover.topk import top_k

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teachercache, "_SHARD_TOKENS", 32)  # two rows


@pytest.fixture
def rows(windows: Tensor) -> TextRows:
    return TextRows(windows.int())


@pytest.fixture
def teacher(tiny_llama_folder: Path) -> Bundle:
    return open_bundle(str(tiny_llama_folder))


class Counting:
    """Loads the teacher, and counts the rows it is asked."""

    def __init__(self, bundle: Bundle, fail_after: int = 1_000) -> None:
        self.bundle, self.loads, self.asked, self.fail_after = bundle, 0, 0, fail_after

    def __call__(self) -> Any:
        self.loads += 1
        inner = ResidentTeacher(self.bundle, CPU, torch.float32)

        def answer(batch: Mapping[str, Tensor]) -> Any:
            self.asked += len(batch["input_ids"])
            if self.asked > self.fail_after:
                raise KeyboardInterrupt
            return inner(batch)

        return answer


def expected(bundle: Bundle, rows: TextRows, k: int) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = bundle.live(torch.float32)(input_ids=rows.ids.long()).logits.flatten(0, 1).log_softmax(-1).detach()
    best, ids = logprobs.topk(k)
    return ids, best, (1 - best.exp().sum(-1)).log()


def test_top_k_is_that_of_whole_distributions() -> None:
    random = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(1100, 6, generator=random), torch.randn(40, 6, generator=random)
    best, ids = (hidden @ weight.T).log_softmax(-1).topk(7)
    made = top_k(hidden, Head(weight), 7)
    assert torch.equal(made.ids, ids)
    torch.testing.assert_close(made.logprobs, best, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made.tail.exp(), 1 - best.exp().sum(-1), rtol=1e-3, atol=1e-5)
    assert top_k(hidden, Head(weight), 1000).ids.shape == (1100, 39)


def test_gives_the_answers_of_the_rows_asked_for(teacher: Bundle, rows: TextRows, tmp_path: Path) -> None:
    load = Counting(teacher)
    cache = open_cache(tmp_path, teacher, rows, load, Run(), k=8, batch=3)
    assert (load.loads, load.asked) == (1, 7)
    ids, best, tail = (x.view(7, 16, *x.shape[1:]) for x in expected(teacher, rows, 8))
    answer = cache.at([5, 0])
    assert torch.equal(answer.ids, torch.cat([ids[5], ids[0]]))
    torch.testing.assert_close(answer.logprobs, torch.cat([best[5], best[0]]), rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(answer.tail, torch.cat([tail[5], tail[0]]), rtol=2e-3, atol=1e-3)
    assert cache.facts["captured_mass"] == pytest.approx(float(best.exp().sum(-1).mean()), rel=1e-3)
    assert sorted(path.name for path in cache.folder.iterdir())[-1] == "teacher-cache.json"
    assert len(list(cache.folder.glob("answers-*.safetensors"))) == 4


def test_a_whole_cache_loads_no_teacher(teacher: Bundle, rows: TextRows, tmp_path: Path) -> None:
    first = open_cache(tmp_path, teacher, rows, Counting(teacher), Run(), k=8)
    again = Counting(teacher)
    second = open_cache(tmp_path, teacher, rows, again, Run(), k=8)
    assert again.loads == 0
    assert second.facts == first.facts
    assert torch.equal(first.at([6]).logprobs, second.at([6]).logprobs)


def test_a_killed_build_goes_on_where_it_was(teacher: Bundle, rows: TextRows, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        open_cache(tmp_path, teacher, rows, Counting(teacher, fail_after=5), Run(), k=8, batch=1)
    rest = Counting(teacher)
    resumed = open_cache(tmp_path, teacher, rows, rest, Run(), k=8, batch=1)
    assert rest.asked == 3  # of the four shards two were written
    whole = open_cache(tmp_path / "other", teacher, rows, Counting(teacher), Run(), k=8, batch=1)
    for name in ("ids", "logprobs", "tail"):
        assert torch.equal(getattr(resumed.at(range(7)), name), getattr(whole.at(range(7)), name))
    assert resumed.facts == whole.facts


def test_anything_else_is_another_cache(
    teacher: Bundle, rows: TextRows, tmp_path: Path, build_model: Callable[..., PreTrainedModel]
) -> None:
    folders = [open_cache(tmp_path, teacher, rows, Counting(teacher), Run(), k=8).folder]
    folders.append(open_cache(tmp_path, teacher, rows, Counting(teacher), Run(), k=9).folder)
    folders.append(open_cache(tmp_path, teacher, TextRows(rows.ids.flip(0)), Counting(teacher), Run(), k=8).folder)
    changed = build_model(teacher.model.config, seed=5)
    changed.save_pretrained(tmp_path / "changed")
    other = open_bundle(str(tmp_path / "changed"))
    folders.append(open_cache(tmp_path, other, rows, Counting(other), Run(), k=8).folder)
    assert len(set(folders)) == 4


def test_damage_is_found(teacher: Bundle, rows: TextRows, tmp_path: Path) -> None:
    cache = open_cache(tmp_path, teacher, rows, Counting(teacher), Run(), k=8)
    shard = cache.folder / "answers-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(FormatError, match=r"answers-00001.safetensors: is damaged"):
        TeacherCache(cache.folder, cache.facts).at([2])
    facts = cache.folder / "teacher-cache.json"
    facts.write_text(json.dumps(cache.facts | {"rows_sha256": "0"}))
    with pytest.raises(FormatError, match="was made of another rows_sha256"):
        open_cache(tmp_path, teacher, rows, Counting(teacher), Run(), k=8)
    facts.write_text("{")
    with pytest.raises(FormatError, match=r"teacher-cache.json: is damaged"):
        open_cache(tmp_path, teacher, rows, Counting(teacher), Run(), k=8)


def test_refuses(teacher: Bundle, rows: TextRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ragged = PaddedRows([Encoded([3, 4], [False, True])] * 3, 0)
    with pytest.raises(RecipeError, match="rows are of different lengths"):
        open_cache(tmp_path, teacher, ragged, Counting(teacher), Run())
    monkeypatch.setattr(teachercache.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(RunError, match="are free; make room"):
        open_cache(tmp_path, teacher, rows, Counting(teacher), Run(), k=8)


def test_guides_a_student_as_the_teacher_itself_would(
    llama: PreTrainedModel, tiny_llama_folder: Path, rows: TextRows, tmp_path: Path
) -> None:
    llama.lm_head.weight.data.mul_(0.5).requires_grad_(True)
    head, weights = head_of(llama), LossWeights(kl=1.0)

    def forward(
        batch: Mapping[str, Tensor], teacher: TeacherTopK, weights: LossWeights, denominator: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = hidden_states(llama, batch).flatten(0, 1)
        return head_loss(hidden, head, batch["labels"].flatten(), teacher, weights, denominator=denominator)

    arguments = (weights, str(tiny_llama_folder), Bundle(llama), llama, CPU, torch.float32)
    batch = rows.batch([4, 1])
    direct = make_guide(*arguments).loss(forward, batch, 30)[0].detach()
    for k, tolerance in ((63, 0.01), (32, 0.5)):
        guide = make_guide(*arguments, cached=CacheOptions(tmp_path, k), rows=rows)
        assert guide.teacher is None
        loss, parts = guide.loss(forward, batch, 30, rows=[4, 1])
        assert float(direct) * (1 - tolerance) < float(parts["kl"]) < float(direct) * 1.01
        assert loss.requires_grad
    with pytest.raises(RecipeError, match="block outputs, which are not cached"):
        make_guide(LossWeights(squarehead=1.0), *arguments[1:], cached=CacheOptions(tmp_path), rows=rows)
