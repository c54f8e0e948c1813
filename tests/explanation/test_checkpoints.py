"""Weights wherever training programs put them, under whatever prefix; and names of classes from files."""

from __future__ import annotations

import argparse
import json
import pickle
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from captum_lnstat import SourceError
from captum_lnstat.explanation.subject.checkpoints import load_checkpoint, read_checkpoint
from captum_lnstat.explanation.subject.classes import read_class_names

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}


def vit(seed: int = 0, classes: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return timm.models.VisionTransformer(num_classes=classes, **SMALL).eval()


def swin(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return timm.models.SwinTransformer(
        img_size=32, patch_size=4, window_size=4, embed_dim=8, depths=(1, 1), num_heads=(1, 2), num_classes=3
    ).eval()


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def load(path: Path, model: nn.Module) -> str:
    return load_checkpoint(model, "the model", read_checkpoint(path), path)


STATE, OTHER = vit(1).state_dict(), vit(2).state_dict()
FORMS = {
    "all of it": (STATE, "x.pth"),
    "tutorial": ({"epoch": 3, "loss": 0.5, "model_state_dict": STATE}, "x.pth: model_state_dict"),
    "lightning": (
        {"epoch": 3, "state_dict": {**prefixed(STATE, "model."), "loss.weight": torch.ones(3)}, "hyper_parameters": {}},
        "x.pth: state_dict, names without 'model.', left out: loss.weight",
    ),
    "parallel": ({"net": prefixed(STATE, "module.")}, "x.pth: net, names without 'module.'"),
    "backbone": (prefixed(STATE, "backbone."), "x.pth: names without 'backbone.'"),
    "whatever": ({"a": {"b": prefixed(STATE, "encoder.tower.")}}, "x.pth: a.b, names without 'encoder.tower.'"),
    "compiled": (prefixed(STATE, "_orig_mod."), "x.pth"),
    "compiled inside": (prefixed(STATE, "module.net._orig_mod."), "x.pth: names without 'module.net.'"),
    "average, timm": ({"state_dict": OTHER, "state_dict_ema": STATE}, "x.pth: state_dict_ema, not state_dict"),
    "average, own": (
        {"model": OTHER, "ema": prefixed(STATE, "module.")},
        "x.pth: ema, names without 'module.', not model",
    ),
    "average, torch": (AveragedModel(vit(1)).state_dict(), "x.pth: names without 'module.', left out: n_averaged"),
    "twice the same": ({"model": STATE, "best": STATE}, "x.pth: model, not best"),
    "with an optimiser": (
        {"optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "momentum": {"a": torch.ones(1)}}, "weights": STATE},
        "x.pth: weights",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_weights_are_found_and_what_was_taken_is_said(tmp_path: Path, form: str) -> None:
    saved, says = FORMS[form]
    torch.save(saved, tmp_path / "x.pth")
    model = vit(5)
    assert load(tmp_path / "x.pth", model) == says
    for name, value in model.state_dict().items():
        assert torch.equal(value, STATE[name]), name


def test_safetensors_a_head_of_another_size_and_a_compiled_model(tmp_path: Path) -> None:
    five = vit(1, classes=5)
    save_file(prefixed(five.state_dict(), "model."), tmp_path / "x.safetensors")
    model = vit()
    assert load(tmp_path / "x.safetensors", model) == "x.safetensors: names without 'model.'"
    image = torch.rand(1, 3, 32, 32)
    assert torch.equal(model(image), five(image))
    torch.save(STATE, tmp_path / "x.pth")
    compiled = torch.compile(vit(3))
    load(tmp_path / "x.pth", compiled)
    assert torch.equal(compiled._orig_mod.state_dict()["pos_embed"], STATE["pos_embed"])


def test_what_a_model_makes_itself_may_be_there_or_not(tmp_path: Path) -> None:
    own = swin(1)
    state = dict(own.state_dict())
    state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.int64)
    torch.save({"model": state}, tmp_path / "x.pth")
    model = swin(2)
    assert load(tmp_path / "x.pth", model) == "x.pth: model"
    image = torch.rand(1, 3, 32, 32)
    assert torch.equal(model(image), own(image))


def test_weights_that_are_not_the_model_s_are_refused(tmp_path: Path) -> None:
    def says(saved: object, match: str) -> None:
        torch.save(saved, tmp_path / "x.pth")
        with pytest.raises(SourceError, match=match):
            load(tmp_path / "x.pth", vit())

    two = r"holds 2 sets of weights that fit the model: student, names without 'module\.'; teacher\. Save the one"
    says({"student": prefixed(STATE, "module."), "teacher": OTHER}, two)
    # LayerScale that the model does not have would be left out, and the model be another one.
    scaled = prefixed({**STATE, "blocks.0.ls1.gamma": torch.ones(16)}, "net.")
    says(
        {"state_dict": scaled}, r"\(state_dict, names without 'net\.'\) does not fit the model: Unexpected .*ls1.gamma"
    )
    headless = {name: value for name, value in STATE.items() if not name.startswith("head.")}
    says(prefixed(headless, "backbone."), r"\(names without 'backbone\.'\) does not fit the model: Missing .*head")
    says(swin().state_dict(), "does not fit the model: Missing")
    says({"epoch": 3, "best": {"top1": 0.5}}, "holds no state dict")


def test_nothing_but_tensors_is_loaded(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (Path(tmp_path / "ran"),)

    torch.save({"state_dict": STATE, "hyper_parameters": argparse.Namespace(lr=1)}, tmp_path / "a.ckpt")
    (tmp_path / "b.pth").write_bytes(pickle.dumps(Evil()))
    for name in ("a.ckpt", "b.pth"):
        with pytest.raises(SourceError, match=r"cannot be read as a checkpoint, .* save the state dict alone"):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "text",
    [
        "cat\ndog, hound\nred fox\n",
        "\ufeffcat\r\ndog, hound\r\nred fox",
        json.dumps(["cat", "dog, hound", "red fox"]),
        json.dumps({"0": "cat", "2": "red fox", "1": "dog, hound"}),
        json.dumps({"id2label": {"0": "cat", "1": "dog, hound", "2": "red fox"}, "num_labels": 3}),
        json.dumps({"red fox": 2, "cat": 0, "dog, hound": 1}),
        json.dumps({"0": ["n1", "cat"], "1": ["n2", "dog, hound"], "2": ["n3", "red fox"]}),
    ],
)
def test_names_in_every_form(tmp_path: Path, text: str) -> None:
    (tmp_path / "names").write_text(text, encoding="utf-8", newline="")
    assert read_class_names(tmp_path / "names") == ("cat", "dog, hound", "red fox")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("cat\n\ndog\n", "has no name for class 1; expected one name a line"),
        ('{"0": "cat", "2": "dog"}', "has no name for class 1"),
        ("[1, 2]", "has no name for class 0"),
        ("[", "cannot be read as names of classes: Expecting value"),
        ("", "holds no names"),
        (None, "cannot be read as names of classes: .*No such file"),
    ],
)
def test_names_that_are_none(tmp_path: Path, text: str | None, says: str) -> None:
    if text is not None:
        (tmp_path / "names").write_text(text)
    with pytest.raises(SourceError, match=says):
        read_class_names(tmp_path / "names")
