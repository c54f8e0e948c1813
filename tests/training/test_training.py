"""Maps while a model is trained, with the real trainers and loggers where they are installed."""

from __future__ import annotations

import importlib.util
import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.training import IMAGES, lightning, small, trained
from PIL import Image

from captum_lnstat import explain
from captum_lnstat.training import MapCallback, log_maps

# What these libraries say of each other and of the settings of a test.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:(pytorch_)?lightning.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
]
ROOT = Path(__file__).parents[2]


def found():
    return explain(small().eval(), IMAGES, [0, 2])


def python(code: str, folder: Path, **environment: str) -> None:
    """Run code in a process of its own, where a library may leave threads and processes behind."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, sys.path)])
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": paths, **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stderr


def test_a_writer_that_takes_no_images_is_refused():
    with pytest.raises(TypeError, match="the writer is a list; expected one with add_image or log"):
        log_maps([], found())


@pytest.fixture
def images_in():
    """What TensorBoard reads of its own files: pictures by tag and step."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard is not installed: pip install 'captum-lnstat[training]'",
    )
    return lambda folder: _images_in(folder, accumulator)


def _images_in(folder: Path, accumulator: Any):
    events = accumulator.EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    tags = events.Tags()["images"]
    return {tag: {each.step: decoded(each.encoded_image_string) for each in events.Images(tag)} for tag in tags}


def decoded(data: bytes):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def test_tensorboard_has_the_overlays(tmp_path, images_in):
    from torch.utils.tensorboard import SummaryWriter

    explained = found()
    with SummaryWriter(str(tmp_path)) as writer:
        log_maps(writer, explained, step=3)
        log_maps(writer, explained[1], tag="one", step=4)
    written = images_in(tmp_path)
    assert {tag: list(steps) for tag, steps in written.items()} == {
        "lnstat/image-0": [3], "lnstat/image-1": [3], "one/image-1": [4],
    }  # fmt: skip
    for each in explained:
        assert (written[f"lnstat/{each.name}"][3] == np.asarray(each.overlay)).all()


@pytest.mark.parametrize("part", [None, "net"])
def test_a_trainer_writes_maps_and_trains_as_without(tmp_path, part, images_in):
    loggers = lightning().loggers
    logger = loggers.TensorBoardLogger(tmp_path)
    callback = MapCallback(IMAGES, [0, 2], every=2, part=part)
    module = trained(tmp_path, callback, logger=[logger, loggers.CSVLogger(tmp_path)], epochs=4)
    alone = trained(tmp_path, epochs=4)
    for (name, value), other in zip(module.state_dict().items(), alone.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    assert module.net.training
    assert not module.frozen.training
    written = images_in(Path(logger.log_dir))
    assert {tag: list(steps) for tag, steps in written.items()} == {f"lnstat/image-{n}": [4, 8] for n in (0, 1)}
    for each in explain(module.net.eval(), IMAGES, [0, 2]):
        assert np.abs(written[f"lnstat/{each.name}"][8] - np.asarray(each.overlay)).max() <= 1
        assert np.abs(written[f"lnstat/{each.name}"][4] - np.asarray(each.overlay)).max() > 1


def test_what_fails_leaves_the_modes(tmp_path):
    modes = []

    class Last(lightning().Callback):
        def on_exception(self, trainer, module, exception):
            modes.append((module.net.training, module.frozen.training))

    logger = lightning().loggers.TensorBoardLogger(tmp_path)
    with pytest.raises(ValueError, match="no class 3"):
        trained(tmp_path, MapCallback(IMAGES, 3), Last(), logger=logger)
    assert modes == [(True, False)]


def test_a_trainer_without_a_logger_of_images_is_refused(tmp_path):
    loggers = lightning().loggers
    for logger, named in ((False, "none"), (loggers.CSVLogger(tmp_path), "CSVLogger")):
        with pytest.raises(ValueError, match=f"no logger that takes images, but {named}; expected"):
            trained(tmp_path, MapCallback(IMAGES), logger=logger)
    trained(tmp_path, MapCallback(IMAGES), logger=True, fast_dev_run=True)  # Lightning takes the logger away
    with pytest.raises(ValueError, match="every is 0"):
        MapCallback(IMAGES, every=0)


def test_strategies_that_shard_weights_are_refused(tmp_path):
    pl = lightning()
    trainer = SimpleNamespace(loggers=[pl.loggers.logger.DummyLogger()], strategy=pl.strategies.FSDPStrategy())
    with pytest.raises(ValueError, match=r"FSDPStrategy shards weights over processes.* expected DDPStrategy"):
        MapCallback(IMAGES).on_fit_start(trainer, None)
    for name in ("DeepSpeedStrategy", "ModelParallelStrategy"):
        assert hasattr(pl.strategies, name)
    trainer.strategy = pl.strategies.DDPStrategy()
    MapCallback(IMAGES).on_fit_start(trainer, None)


def test_the_library_under_its_older_name(tmp_path):
    pytest.importorskip("pytorch_lightning", reason="pytorch_lightning is not installed")
    python(
        """
import sys
import pytorch_lightning
sys.modules["lightning.pytorch"] = None
from captum_lnstat.training import MapCallback
assert issubclass(MapCallback, pytorch_lightning.Callback)
""",
        tmp_path,
    )


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed: pip install wandb")
@pytest.mark.parametrize("by_trainer", [False, True])
def test_weights_and_biases_has_the_overlays(tmp_path, by_trainer):
    code = """
import wandb
from captum_lnstat import explain
from captum_lnstat.training import log_maps
from helpers.training import IMAGES, small
run = wandb.init(project="maps")
log_maps(run, explain(small().eval(), IMAGES, [0, 2]), step=3)
run.finish()
"""
    if by_trainer:
        lightning()
        code = """
from pathlib import Path
from captum_lnstat.training import MapCallback
from helpers.training import IMAGES, lightning, trained
logger = lightning().loggers.WandbLogger(project="maps", offline=True)
trained(Path(), MapCallback(IMAGES, [0, 2]), logger=logger)
logger.experiment.finish()
"""
    folders = dict.fromkeys(("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"), str(tmp_path))
    python(code, tmp_path, WANDB_MODE="offline", WANDB_SILENT="true", WANDB_CONSOLE="off", **folders)
    pictures = [decoded(file.read_bytes()) for file in tmp_path.rglob("media/images/**/*.png")]
    assert len(pictures) == (4 if by_trainer else 2)
    for each in () if by_trainer else found():
        assert any((picture == np.asarray(each.overlay)).all() for picture in pictures)
