"""The torchmetrics classes: the functions' means, for any split into batches and processes."""

import pickle
import sys

import pytest
import torch
import torch.multiprocessing
from helpers import metric_process
from helpers.metric_harness import CASES, expected, maps, masks

from captum_lnstat import metrics
from captum_lnstat.metrics import _CLASSES

EVERY = [0, 1, 2, 3, 4, 5]


def equal(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    return torch.equal(one, other)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_class_is_the_mean_of_its_reference(case):
    metric = case.metric()
    metric.update(*case.chosen(EVERY))
    value = metric.compute()
    value = value if case.key is None else value[case.key]
    assert value.item() == pytest.approx(sum(expected(case)) / 6, abs=1e-6)


def test_any_split_gives_the_same_figures():
    for name, metric, arguments in metric_process.everything():
        metric.update(*arguments(EVERY))
        whole = metric.compute()
        for split in ([[0], [1], [2], [3], [4], [5]], [[5, 1], [2, 0, 4], [3]]):
            metric.reset()
            for places in split:
                metric(*arguments(places))  # the way that also gives the batch's own figure
            assert equal(metric.compute(), whole), name
        copy = pickle.loads(pickle.dumps(metric))
        assert equal(copy.compute(), whole), name


def test_two_processes_give_the_same_figures(tmp_path):
    torch.multiprocessing.spawn(metric_process.run, (str(tmp_path),), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for name, metric, arguments in metric_process.everything():
        metric.update(*arguments(EVERY))
        assert equal(found[0][name], metric.compute()), name
        assert equal(found[1][name], found[0][name]), name


def test_directions_and_bounds_are_declared():
    lower = {"Deletion", "Infidelity", "MapCorrelation", "PositivePerturbation", "Sensitivity"}
    for name in _CLASSES:
        kind = getattr(metrics, name)
        assert kind.higher_is_better == (name not in lower), name
        assert kind.full_state_update is False
        assert kind.plot_lower_bound == (-1.0 if name in ("MapCorrelation", "SaCo", "Spearman") else 0.0)
        assert (kind.plot_upper_bound is None) == (name in ("Infidelity", "Sensitivity"))
        assert kind.__doc__
        assert name in dir(metrics)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_a_figure_of_nothing_is_refused():
    for name, metric, _ in metric_process.everything():
        with pytest.raises(ValueError, match="has seen no image; call update first"):
            metric.compute()
        assert name


def test_a_refused_batch_leaves_the_sums():
    metric = metrics.Segmentation()
    truth = torch.ones(6, *maps().shape[1:], dtype=torch.long)
    metric.update(maps(), truth)
    before = metric.compute()
    metric = metrics.Segmentation()
    metric.update(maps(), truth)
    truth[5] = -1
    with pytest.raises(ValueError, match="image 5"):
        metric.update(maps(), truth)
    assert equal(metric.compute(), before)
    with pytest.raises(ValueError, match="threshold is 'half'"):
        metrics.IoU("half")


def test_without_torchmetrics_the_functions_stay_and_the_classes_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    for module in ("classes", "model_classes"):
        monkeypatch.delitem(sys.modules, f"captum_lnstat.metrics.{module}", raising=False)
        monkeypatch.delattr(metrics, module, raising=False)
    assert metrics.pointing(maps(), masks()).shape == (6,)
    for name in ("Pointing", "Infidelity"):
        with pytest.raises(ImportError, match=r'pip install "captum-lnstat\[evaluate\]"'):
            getattr(metrics, name)
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        metrics.Nothing  # noqa: B018
