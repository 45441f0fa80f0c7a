import numpy as np
import pytest
import torch
from torch import Tensor

from compressllm.core.run import Run
from compressllm.select.neighbours import affinity, nearest, own_scale

pytest.importorskip("sklearn", reason="clustering needs scikit-learn: pip install scikit-learn scipy")

from sklearn.metrics import adjusted_rand_score

from compressllm.select import diffusion
from compressllm.select.clustering import Clustering
from compressllm.select.diffusion import diffusion_map, extend


def planted(sizes: list[int], width: int = 24, spread: float = 0.12) -> tuple[Tensor, Tensor]:
    """Unit vectors around random directions, shuffled, and the direction of each."""
    generator = torch.Generator().manual_seed(3)
    centres = torch.nn.functional.normalize(torch.randn(len(sizes), width, generator=generator))
    truth = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    truth = truth[torch.randperm(len(truth), generator=generator)]
    noise = spread * torch.randn(len(truth), width, generator=generator)
    return torch.nn.functional.normalize(centres[truth] + noise), truth


def graph_of(points: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    found, distances = nearest(points, points, k, Run(), "x", same=True)
    return found, distances, own_scale(distances)


def test_nearest_are_those_of_the_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    from compressllm.select import neighbours

    monkeypatch.setattr(neighbours, "_ROWS", 7)  # several chunks, the last one short
    points, _ = planted([20, 20])
    found, distances, _ = graph_of(points, 5)
    whole = torch.cdist(points.double(), points.double())
    whole.fill_diagonal_(torch.inf)
    expected = whole.topk(5, largest=False)
    assert torch.equal(found, expected.indices)
    torch.testing.assert_close(distances.double(), expected.values, rtol=1e-3, atol=1e-3)


def test_affinities_are_symmetric_and_as_defined() -> None:
    points, _ = planted([15, 15])
    found, distances, scale = graph_of(points, 4)
    graph = affinity(found, distances, scale).toarray()
    assert np.array_equal(graph, graph.T)
    near = {(i, int(j)) for i in range(30) for j in found[i]}
    for i in range(30):
        for j in range(30):
            square = float((points[i] - points[j]).double() @ (points[i] - points[j]).double())
            expected = np.exp(-square / float(scale[i] * scale[j])) if (i, j) in near or (j, i) in near else 0.0
            assert graph[i, j] == pytest.approx(expected, abs=1e-4)


def test_the_map_is_that_of_the_random_walk_written_out() -> None:
    points, _ = planted([15, 12, 10])
    graph = affinity(*graph_of(points, 5))
    made = diffusion_map(graph, 4, seed=0)
    whole = graph.toarray()
    whole += diffusion._ANYWHERE * whole.sum(axis=1).mean() / len(whole)
    walk = whole / whole.sum(axis=1, keepdims=True)
    values = np.sort(np.linalg.eigvals(walk).real)[::-1]
    np.testing.assert_allclose(made.eigenvalues, values[1:6], atol=1e-8)
    for vector, value in zip(made.vectors.T, made.eigenvalues, strict=False):
        np.testing.assert_allclose(walk @ vector, value * vector, atol=1e-8)
        assert vector[np.abs(vector).argmax()] > 0
    np.testing.assert_allclose(np.linalg.norm(made.coordinates(made.vectors, 1.0), axis=1), 1)


def test_a_point_beside_others_is_placed_where_they_are() -> None:
    points, truth = planted([30, 30])
    made = diffusion_map(affinity(*graph_of(points, 8)), 1, seed=0)
    near = torch.tensor([(truth == side).nonzero().squeeze(1)[:5].tolist() for side in (0, 1)])
    placed = extend(made, near, torch.ones(2, 5))[:, 0]
    for side in (0, 1):
        own = made.vectors[near[side].numpy(), 0]
        assert placed[side] == pytest.approx(own.mean() / made.eigenvalues[0])


@pytest.mark.parametrize("landmarks", [20_000, 250])
def test_planted_clusters_are_found_with_their_number(landmarks: int) -> None:
    points, truth = planted([120, 100, 90, 80, 70, 60, 40])
    found = Clustering(landmarks=landmarks).divide(points, 0, Run())
    assert found.notes["clusters"] == 7
    assert adjusted_rand_score(truth, found.labels) > 0.9
    assert np.bincount(found.labels).tolist() == sorted(np.bincount(found.labels), reverse=True)
    again = Clustering(landmarks=landmarks).divide(points, 0, Run())
    assert np.array_equal(found.labels, again.labels)
    assert np.array_equal(found.coordinates, again.coordinates)


def test_equal_texts_are_no_trouble() -> None:
    points, _ = planted([60, 60])
    points = torch.cat([points, points[:1].repeat(80, 1)])
    found = Clustering(fewest=2).divide(points, 0, Run())
    assert len(found.labels) == 200
    assert np.isfinite(found.coordinates).all()


@pytest.mark.parametrize("count", [1, 2, 19, 20, 25, 60])
def test_few_points_make_few_clusters(count: int) -> None:
    points, _ = planted([count])
    found = Clustering().divide(points, 0, Run())
    assert len(found.labels) == count
    assert found.labels.max() + 1 <= max(1, count // 10)
