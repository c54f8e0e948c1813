import itertools

import pytest
import torch
from scipy import stats

from captum_lnstat.metrics import spearman, spearman_ceiling
from captum_lnstat.metrics.agreement import average_ranks


@pytest.mark.parametrize("marks", [(0, 0, 1, 1, 0), (0, 1, 1, 2, 2), (1, 2, 3, 4, 5), (0, 0, 0, 0, 1)])
def test_the_ceiling_is_the_best_of_all_orders(marks):
    best = max(stats.spearmanr(order, marks).statistic for order in itertools.permutations(range(5)))
    human = torch.tensor([[marks]], dtype=torch.float64)
    assert spearman_ceiling(human).item() == pytest.approx(best, abs=1e-12)


def test_a_binary_mask_and_the_same_as_grades_are_one():
    mask = torch.rand(3, 5, 5) > 0.5
    values = torch.randn(3, 5, 5)
    assert torch.equal(spearman(values, mask), spearman(values, mask.float() * 9 - 4))
    assert torch.equal(spearman_ceiling(mask), spearman_ceiling(mask.float()))
    # For many pixels sqrt(3 p (1 - p)), which is below 1.
    half = torch.arange(10000).view(1, 100, 100) < 5000
    assert spearman_ceiling(half).item() == pytest.approx(0.75**0.5, abs=1e-6)


def test_ranks_are_scipys():
    values = torch.randint(0, 5, (4, 30)).float()
    assert average_ranks(values).tolist() == [stats.rankdata(row).tolist() for row in values.numpy()]


def test_an_annotation_of_nothing_is_refused():
    human = torch.rand(3, 4, 4)
    human[1] = 0.5
    for function in (lambda: spearman(torch.rand(3, 4, 4), human), lambda: spearman_ceiling(human)):
        with pytest.raises(ValueError, match="human of image 1 has one value everywhere"):
            function()
