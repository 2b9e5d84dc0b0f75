"""Two Gaussians fitted to many samples at once, against a plain fit of one sample at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from codetr.heads.mixture import fit_mixture
from tests.projects.codetr import plain


def samples(seed: int = 0) -> list[np.ndarray]:
    """Samples of 2 to 45 values, of one hump or two."""
    random = np.random.default_rng(seed)
    result = []
    for number in range(40):
        near = random.normal(0.7, 0.05 + 0.2 * random.random(), 1 + number % 20)
        far = random.normal(1 + 3 * random.random(), 0.1 + random.random(), 1 + (7 * number) % 25)
        result.append(np.abs(np.concatenate([near, far])))
    return result


def padded(each: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.full((len(each), 45), float("nan"))
    mask = torch.zeros(len(each), 45, dtype=torch.bool)
    for row, sample in enumerate(each):
        values[row, : len(sample)] = torch.from_numpy(sample)
        mask[row, : len(sample)] = True
    return values, mask


def test_equals_a_plain_fit_of_each_sample():
    each = samples()
    mixture = fit_mixture(*padded(each))
    for row, sample in enumerate(each):
        weights, means, variances = plain.fit_mixture(sample.astype(np.float32).astype(np.float64))
        np.testing.assert_allclose(mixture.weights[row], weights, atol=1e-6)
        np.testing.assert_allclose(mixture.means[row], means, atol=1e-6)
        np.testing.assert_allclose(mixture.variances[row], variances, atol=1e-6)


def test_the_limit_of_iterations_is_kept():
    each = samples()
    mixture = fit_mixture(*padded(each), iterations=3)
    for row, sample in enumerate(each):
        _, means, _ = plain.fit_mixture(sample.astype(np.float32).astype(np.float64), steps=3)
        np.testing.assert_allclose(mixture.means[row], means, atol=1e-6)


def test_equals_scikit_learn():
    mixtures = pytest.importorskip("sklearn.mixture", reason="scikit-learn is not installed")
    each = samples()
    values, mask = padded(each)
    mixture = fit_mixture(values, mask)
    logs = mixture.log_densities(values)
    for row, sample in enumerate(each):
        theirs = mixtures.GaussianMixture(
            2,
            weights_init=[0.5, 0.5],
            means_init=[[sample.min()], [sample.max()]],
            precisions_init=np.ones((2, 1, 1)),
        ).fit(sample[:, None])
        np.testing.assert_allclose(mixture.means[row], theirs.means_[:, 0], atol=1e-4)
        mine = logs[row, : len(sample)]
        assert mine.argmax(dim=1).tolist() == theirs.predict(sample[:, None]).tolist()
        scores = theirs.score_samples(sample[:, None])
        np.testing.assert_allclose(mine.logsumexp(dim=1), scores, atol=1e-3)


@pytest.mark.parametrize("sample", [[], [1.5], [2.0, 2.0], [0.0, 1e4], [1e-8] * 45])
def test_odd_samples_stay_finite(sample):
    values, mask = padded([np.array(sample, dtype=np.float64)])
    mixture = fit_mixture(values, mask)
    assert all(part.isfinite().all() for part in mixture)
    assert mixture.log_densities(torch.where(mask, values, 0.0)).isfinite().all()


def test_batch_dimensions():
    each = samples()[:6]
    values, mask = padded(each)
    flat = fit_mixture(values, mask)
    square = fit_mixture(values.view(2, 3, 45), mask.view(2, 3, 45))
    for one, other in zip(flat, square):
        assert torch.equal(one.view(2, 3, 2), other)
