import random

import pytest
import torch
from torch import Tensor

from compressllm.core.errors import PatternError
from compressllm.core.pattern import NM, SparsityPattern, Unstructured, parse_pattern


def keep_slowly(scores: list[float], remove: int) -> list[bool]:
    """One comparison group: remove the lowest score, the lower column among equals, until enough are gone."""
    keep = [True] * len(scores)
    for _ in range(remove):
        left = [column for column, kept in enumerate(keep) if kept]
        lowest = left[0]
        for column in left:
            if scores[column] < scores[lowest]:
                lowest = column
        keep[lowest] = False
    return keep


def oracle(pattern: SparsityPattern, scores: Tensor) -> Tensor:
    rows, columns = scores.shape
    if isinstance(pattern, NM):
        groups = scores.reshape(-1, pattern.m).tolist()
        kept = [keep_slowly(group, pattern.m - pattern.n) for group in groups]
    elif pattern.group == "layer":
        kept = [keep_slowly(scores.flatten().tolist(), round(rows * columns * pattern.fraction - 0.4999))]
    else:
        kept = [keep_slowly(row, round(columns * pattern.fraction - 0.4999)) for row in scores.tolist()]
    return torch.tensor(kept).view(rows, columns)


def tied_scores(rows: int, columns: int, levels: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, levels, (rows, columns), generator=generator).float()


PATTERNS = [
    *(NM(n, m) for n, m in [(1, 4), (2, 4), (3, 4), (4, 8), (1, 2), (5, 16), (2, 3)]),
    *(Unstructured(fraction, group) for fraction in (0.0, 0.3, 0.5, 1.0) for group in ("row", "layer")),
]


@pytest.mark.parametrize("levels", [1, 2, 4, 1000])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_keeps_what_an_obvious_loop_keeps(pattern: SparsityPattern, levels: int) -> None:
    scores = tied_scores(5, 48, levels)
    keep = pattern.keep(scores)
    assert keep.dtype == torch.bool
    assert torch.equal(keep, oracle(pattern, scores))


@pytest.mark.parametrize("pattern", [NM(1, 4), NM(2, 4), NM(4, 8)], ids=str)
def test_every_group_keeps_exactly_n_even_when_all_are_equal(pattern: NM) -> None:
    for scores in (torch.zeros(3, 16), torch.full((3, 16), float("inf")), torch.full((3, 16), float("-inf"))):
        keep = pattern.keep(scores).view(-1, pattern.m)
        assert (keep.sum(1) == pattern.n).all()
        assert keep[:, pattern.m - pattern.n :].all()  # lower columns went first


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [
        (Unstructured(0.0, "row"), [10, 10, 10]),
        (Unstructured(0.5, "row"), [5, 5, 5]),
        (Unstructured(0.25, "row"), [8, 8, 8]),  # 2.5 of ten is rounded down to 2 removed
        (Unstructured(0.29, "row"), [8, 8, 8]),
        (Unstructured(1.0, "row"), [0, 0, 0]),
        (Unstructured(0.0, "layer"), [10, 10, 10]),
        (Unstructured(0.5, "layer"), [0, 5, 10]),  # lower columns and rows are the earlier ones
        (Unstructured(1.0, "layer"), [0, 0, 0]),
    ],
    ids=str,
)
def test_unstructured_counts_are_exact_with_ties(pattern: Unstructured, kept: list[int]) -> None:
    assert pattern.keep(torch.ones(3, 10)).sum(1).tolist() == kept


def test_a_group_left_open_means_rows_and_can_be_filled_in() -> None:
    scores = tied_scores(4, 10, 3)
    assert torch.equal(Unstructured(0.5).keep(scores), Unstructured(0.5, "row").keep(scores))
    assert Unstructured(0.5).within("layer") == Unstructured(0.5, "layer")
    assert Unstructured(0.5, "row").within("layer") == Unstructured(0.5, "row")


@pytest.mark.parametrize("count", [1, 7, 100, 128, 11008])
def test_a_fraction_is_not_rounded_down_by_the_last_bit_of_a_float(count: int) -> None:
    for removed in {0, 1, count // 3, count - 1, count}:
        assert Unstructured(removed / count).removed_of(count) == removed
    assert Unstructured(0.29).removed_of(100) == 29  # 100 * 0.29 is 28.999999999999996


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_one_nan_is_refused(pattern: SparsityPattern) -> None:
    scores = tied_scores(4, 48, 3)
    scores[2, 5] = float("nan")
    with pytest.raises(PatternError, match="NaN"):
        pattern.keep(scores)


@pytest.mark.parametrize("pattern", [p for p in PATTERNS if 0 < p.sparsity < 1], ids=str)
def test_violations_count_groups_that_keep_too_much(pattern: SparsityPattern) -> None:
    keep = pattern.keep(tied_scores(6, 48, 4))
    assert pattern.violations(keep) == 0
    assert pattern.violations(torch.zeros_like(keep)) == 0  # fewer than allowed is no violation
    rows, removed = [], (~keep).nonzero().tolist()
    for row, column in removed:  # one too many in three different rows
        if row not in rows and len(rows) < 3:
            keep[row, column] = True
            rows.append(row)
    assert pattern.violations(keep) == (1 if str(pattern).endswith("layer") else 3)


def test_violations_are_counted_by_group_and_not_by_row() -> None:
    keep = torch.tensor([[1, 1, 1, 0, 1, 1, 1, 1], [1, 0, 1, 0, 0, 0, 0, 0]]).bool()
    assert NM(2, 4).violations(keep) == 2
    assert NM(4, 8).violations(keep) == 1
    assert NM(3, 4).violations(keep) == 1


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8), NM(2, 3)], ids=str)
def test_columns_that_are_no_multiple_of_m_are_refused(pattern: NM) -> None:
    assert pattern.refuses((8, 48)) is None
    reason = f"46 inputs are not a multiple of {pattern.m}, as {pattern} needs"
    assert pattern.refuses((8, 46)) == reason
    for refused in (pattern.keep, pattern.violations):
        with pytest.raises(PatternError, match=reason):
            refused(torch.ones(8, 46))
    assert Unstructured(0.5).refuses((8, 47)) is None


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("2:4", NM(2, 4)),
        (" 4 : 8 ", NM(4, 8)),
        ("1:64", NM(1, 64)),
        ("0.5", Unstructured(0.5)),
        (".5", Unstructured(0.5)),
        ("0", Unstructured(0.0)),
        ("1", Unstructured(1.0)),
        ("50%", Unstructured(0.5)),
        ("62.5 %", Unstructured(0.625)),
        ("0.5/row", Unstructured(0.5, "row")),
        ("50% / layer", Unstructured(0.5, "layer")),
    ],
)
def test_parse(text: str, pattern: SparsityPattern) -> None:
    assert parse_pattern(text) == pattern
    assert parse_pattern(pattern) is pattern


def test_str_reads_back_to_the_same_pattern() -> None:
    draw = random.Random(0).random
    fractions = [0.0, 1.0, 0.5, 1 / 3, 2 / 3, 0.1, 0.6999999, 1e-5, 1e-12, *(draw() for _ in range(50))]
    made = [Unstructured(fraction, group) for fraction in fractions for group in (None, "row", "layer")]
    for pattern in [*PATTERNS, *made]:
        assert parse_pattern(str(pattern)) == pattern
    assert [str(NM(2, 4)), str(Unstructured(0.5)), str(Unstructured(0.7, "layer"))] == ["2:4", "0.5", "0.7/layer"]


@pytest.mark.parametrize(
    "text",
    [
        *("3:2", "2:2", "0:4", "0:0", "-1:4", "1:65", "2:4:8", "2:", ":4", "2:4/row"),
        *("1.5", "150%", "-0.5", "5e2", "0.5/col", "0.5/", "2/4", "0,5", "nan", "inf", "half", "", " ", "0.5\n0.6"),
    ],
)
def test_nonsense_is_a_pattern_error_of_one_line(text: str) -> None:
    with pytest.raises(PatternError) as caught:
        parse_pattern(text)
    assert len(str(caught.value).splitlines()) == 1


def test_sparsity_is_the_fraction_removed() -> None:
    assert (NM(1, 4).sparsity, NM(4, 8).sparsity, Unstructured(0.7).sparsity) == (0.75, 0.5, 0.7)
