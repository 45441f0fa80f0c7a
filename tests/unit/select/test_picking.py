from compressllm.select.concepts import ConceptGraph
from compressllm.select.picking import pick


def test_phrases_known_apart_conflict() -> None:
    graph = ConceptGraph()
    graph.add(["sea", "ship"])
    graph.add(["desert", "camel"])
    assert graph.conflict(["sea", "camel"]) == ("sea", "camel")
    assert graph.conflict(["camel", "new", "sea"]) == ("camel", "sea")
    assert graph.conflict(["sea", "ship", "new"]) is None
    assert graph.conflict(["sea"]) is None
    assert graph.conflict(["unknown", "others"]) is None
    graph.add(["sea", "camel"])
    assert graph.conflict(["camel", "sea"]) is None


def test_clusters_take_turns_best_first() -> None:
    picked = pick([[4, 1, 2], [0, 3]], [2, 1], [3, 2], [[]] * 5)
    assert picked.ids == [4, 0, 1]
    assert picked.rejected == picked.readmitted == [0, 0]


def test_a_conflicting_record_gives_way_to_the_next() -> None:
    phrases = [["sea", "ship"], ["desert", "camel"], ["sea", "camel"], ["moon"]]
    picked = pick([[0, 1, 2, 3]], [3], [10], phrases)
    assert picked.ids == [0, 1, 3]
    assert picked.rejected == [1]
    assert picked.conflicts == [("sea", "camel")]


def test_the_budget_is_met_with_rejected_ones_if_need_be() -> None:
    phrases = [["sea", "ship"], ["desert", "camel"], ["sea", "camel"], ["moon"]]
    picked = pick([[0, 1, 2, 3]], [4], [10], phrases)
    assert picked.ids == [0, 1, 3, 2]
    assert picked.readmitted == [1]


def test_a_fifth_of_a_cluster_is_the_most_that_is_rejected() -> None:
    phrases = [["sea", "ship"], ["desert", "camel"], *[["sea", "camel", str(one)] for one in range(8)]]
    picked = pick([list(range(10))], [5], [10], phrases)
    assert picked.rejected == [2]
    assert picked.ids == [0, 1, 4, 5, 6]
