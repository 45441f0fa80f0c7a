import pytest

from compressllm.kernels.auto import Picked, pick


def seconds(**backends: list[float]) -> dict[str, dict[int, float]]:
    return {name: dict(zip((1, 16, 256), times, strict=True)) for name, times in backends.items()}


def test_the_fastest_at_one_token_wins():
    picked = pick(seconds(dense=[10, 20, 200], slow=[8, 20, 200], fast=[5, 20, 200]))
    assert picked.name == "fast"
    assert picked.dense_from is None
    assert picked.lost == {
        "dense": "takes 2.00 times as long as fast at 1 token",
        "slow": "takes 1.60 times as long as fast at 1 token",
    }


def test_prompts_decide_between_backends_alike_at_one_token():
    picked = pick(seconds(dense=[10, 40, 400], exact=[5, 20, 200], rounded=[5.4, 10, 100]))
    assert picked.name == "rounded"
    assert picked.lost["exact"] == "takes 2.00 times as long as rounded at 16 tokens"
    assert pick(seconds(dense=[10, 40, 400], exact=[5, 20, 200], rounded=[5.6, 10, 100])).name == "exact"


def test_prompts_are_those_of_the_dense_copy_where_it_takes_over():
    kept = pick(seconds(dense=[10, 20, 100], one=[5, 15, 900], other=[5.1, 19, 90]), keep_dense=True)
    assert (kept.name, kept.dense_from) == ("one", 256)


def test_nothing_is_chosen_that_is_slower_than_dense_by_more_than_a_twentieth():
    picked = pick(seconds(dense=[10, 20, 200], fast=[5, 20, 220]))
    assert picked == Picked(
        "dense", {"fast": "takes 1.10 times as long as dense at 256 tokens; it is slower at 256 tokens only"}
    )
    assert pick(seconds(dense=[10, 20, 200], fast=[5, 20.9, 209])).name == "fast"
    everywhere = pick(seconds(dense=[10, 20, 200], slow=[11, 22, 240]))
    assert everywhere.lost == {"slow": "takes 1.20 times as long as dense at 256 tokens"}


@pytest.mark.parametrize(("times", "dense_from"), [([5, 20, 300], 256), ([5, 40, 300], 16), ([5, 20, 200], None)])
def test_a_dense_copy_takes_over_where_it_is_faster(times, dense_from):
    picked = pick(seconds(dense=[10, 20, 200], fast=times), keep_dense=True)
    assert (picked.name, picked.dense_from) == ("fast", dense_from)


def test_a_dense_copy_does_not_take_over_in_the_middle():
    assert pick(seconds(dense=[10, 20, 200], odd=[5, 40, 200]), keep_dense=True).name == "dense"
    assert pick(seconds(dense=[10, 20, 200], slow=[11, 40, 300]), keep_dense=True).name == "dense"


def test_without_dense_there_is_no_bound():
    assert pick(seconds(one=[5, 20, 200], other=[4, 90, 900])).name == "other"
