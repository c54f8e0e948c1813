"""What ``captum-lnstat doctor`` and ``describe`` say of a model, in words and as JSON."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch
from click.testing import CliRunner, Result
from helpers.contract import CLASSES, images, registers, swin, vit
from torch import nn

import captum_lnstat.doctor as doctor_room
from captum_lnstat import LNStatAttribution, UnsupportedModelError, cli, doctor
from captum_lnstat.doctor import examine
from captum_lnstat.explanation.subject import progress


@pytest.fixture(autouse=True)
def _models(monkeypatch):
    """A module with the models, as a user's own package would be; no progress on stderr."""
    mine = types.ModuleType("mine")
    mine.vit, mine.swin, mine.nothing = vit, swin, lambda: None
    mine.convolutions = lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    mine.models = types.SimpleNamespace(registers=registers)
    monkeypatch.setitem(sys.modules, "mine", mine)
    monkeypatch.setattr(progress, "FIRST_WORD", 600.0)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.main, ["doctor", *map(str, arguments)], prog_name="captum-lnstat")


def test_every_site_is_listed_with_its_shape_and_norms():
    result = run("mine:swin", "--image-size", 32, 32)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "mine:swin: supported"
    assert lines[1].startswith("SwinTransformer: windowed transformer, 8 x 8 patches of 4 x 4 px, 0 prefix tokens")
    assert lines[2].startswith(f"head: mean of the tokens, output (1, {CLASSES})")
    assert lines[3].startswith("rule lnstat: max(G, 0)")
    sites = [line.split(":")[0].strip() for line in lines[4:]]
    assert sites == [
        "layers.0.blocks.0", "layers.0.blocks.1", "layers.1.downsample", "layers.1.blocks.0", "layers.1.blocks.1",
    ]  # fmt: skip
    assert "4 x 2 heads x 16 x 16, residual share" in lines[4]
    assert lines[4].endswith("; norm1, norm2")
    assert lines[6].endswith("merging, 16 tokens of 4 children; norm")


def test_the_json_record_holds_the_same():
    result = run("mine:models.registers", "--json", "--image-size", 32, 32)
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    described = LNStatAttribution(registers()).describe(images(1))
    assert record["name"] == "mine:models.registers"
    assert record["supported"] is True
    assert record["image_size"] == [32, 32]
    assert (record["family"], record["grid"], record["patch"], record["prefix_tokens"]) == ("plain", [4, 4], [8, 8], 5)
    assert (record["model"], record["pooling"], record["covers"]) == ("VisionTransformer", described.pooling, "")
    assert record["rules"] == dict.fromkeys(("lnstat", "evidence", "rollout", "gradient"))
    first = record["steps"][0]
    assert (first["name"], first["kind"], first["shape"]) == ("blocks.0", "attention", [1, 2, 21, 21])
    assert first["norms"] == ["norm1", "norm2"]
    assert first["residual"]["min"] <= first["residual"]["mean"] <= first["residual"]["max"]


@pytest.mark.parametrize("model", [vit, swin, registers])
def test_a_description_survives_json(model):
    record = LNStatAttribution(model()).describe(images(1)).to_dict()
    assert json.loads(json.dumps(record)) == record
    assert all(step["norms"] for step in record["steps"])


def test_what_the_map_covers_is_said(monkeypatch):
    description = LNStatAttribution(vit()).describe(images(1))
    assert "covers" not in str(description)
    object.__setattr__(description, "covers", "not the stem")
    assert str(description).splitlines()[3] == "covers: not the stem"
    assert description.to_dict()["covers"] == "not the stem"


def test_a_refused_model_is_an_exit_code_and_a_reason():
    result = run("mine:convolutions", "--image-size", 32, 32)
    assert result.exit_code == 1
    assert result.stdout.startswith("mine:convolutions: refused at 32 x 32 px\n")
    assert "not a vision transformer" in result.stdout
    record = json.loads(run("mine:convolutions", "--json", "--image-size", 32, 32).stdout)
    assert record["supported"] is False
    assert record["error"] == "UnsupportedModelError"
    assert record["reason"] in result.stdout
    assert "family" not in record


def test_an_image_size_that_the_model_does_not_take_is_refused_too():
    result = run("mine:vit", "--image-size", 40, 32)
    assert result.exit_code == 1
    assert "40" in result.stdout.split("px", 1)[1]


def test_a_rule_that_is_not_defined_is_named(monkeypatch):
    right = LNStatAttribution.relevance

    def relevance(self, *arguments):
        if self.rule == "gradient":
            raise UnsupportedModelError("no gradient here; rule='evidence' is defined")
        return right(self, *arguments)

    monkeypatch.setattr(doctor.LNStatAttribution, "relevance", relevance)
    found = examine(vit(), (32, 32))
    assert found.refusal is None
    assert found.rules["gradient"] == "no gradient here; rule='evidence' is defined"
    assert str(found).endswith("rule 'gradient' is not defined: no gradient here; rule='evidence' is defined")
    monkeypatch.setattr(doctor, "rule_names", lambda: ("gradient",))
    assert isinstance(examine(vit(), (32, 32)).refusal, UnsupportedModelError)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("vit_tinny_patch16_224", "did you mean"),
        ("mine:absent", "AttributeError"),
        ("no.such.package:model", "No module named 'no', neither installed"),
        ("mine:nothing", "returned a NoneType; expected a torch.nn.Module"),
        ("torchvision:no_such_model", "unknown model 'torchvision:no_such_model'"),
    ],
)
def test_a_name_that_means_nothing_is_one_line(name, says):
    result = run(name)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert says in result.stderr


@pytest.mark.parametrize(
    ("name", "size"),
    [("swin-mini", [64, 64]), ("vit_tiny_patch16_224", [224, 224]), ("torchvision:vit_b_32", [224, 224])],
)
def test_the_image_size_is_the_model_s_own(monkeypatch, name, size):
    sizes = []
    monkeypatch.setattr(
        doctor_room, "examine", lambda model, image_size: sizes.append(list(image_size)) or examine(vit(), (32, 32))
    )
    assert run(name).exit_code == 0
    assert sizes == [size]


def test_transformers_are_made_from_their_configuration(monkeypatch):
    pytest.importorskip("transformers")
    seen = []
    monkeypatch.setattr(
        doctor_room,
        "examine",
        lambda model, image_size: seen.append((model, image_size)) or examine(vit(), (32, 32)),
    )
    assert run("hf:ViTConfig").exit_code == 0
    ((model, size),) = seen
    assert type(model).__name__ == "ViTForImageClassification"
    assert size == (224, 224)
    assert not model.training


def test_the_model_stays_as_it_was():
    model = vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    examine(model, (32, 32))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
