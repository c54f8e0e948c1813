"""The examples as somebody who copies them has them: the pipeline with a model made here, the service as a process."""

from __future__ import annotations

import base64
import http.client
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.browser import PATIENCE, until
from PIL import Image

from captum_lnstat import explain, zoo

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_pipeline_has_a_map_for_every_label():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.SwinConfig(
        image_size=64, embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=4,
        id2label={number: f"kind {number}" for number in range(5)},
    )  # fmt: skip
    model = transformers.SwinForImageClassification(config).eval()
    with torch.no_grad():
        model.classifier.weight.mul_(40)  # so that the labels differ
    processor = transformers.ViTImageProcessor(
        size={"height": 64, "width": 64}, image_mean=[0.4] * 3, image_std=[0.3] * 3
    )
    pipe = transformers.pipeline("image-classification", model=model, image_processor=processor)
    image = zoo.scenes()[5].image.resize((90, 70))
    labels, maps = load("hugging_face_pipeline").classify(pipe, image)
    assert [label["label"] for label in labels] == [each.class_names[each.target] for each in maps]
    np.testing.assert_allclose([label["score"] for label in labels], [each.confidence for each in maps], rtol=1e-4)
    inputs = processor(image, return_tensors="pt").pixel_values
    for each in maps:
        alone = explain(model, inputs, each.target)[0]
        np.testing.assert_allclose(each.grid, alone.grid, atol=1e-6 * abs(alone.grid).max())


@pytest.fixture
def service(tmp_path):
    """The running example: its port."""
    for name in ("fastapi", "uvicorn"):
        pytest.importorskip(name, reason=f'{name} is not installed: pip install ".[demo]"')
    log = tmp_path / "log"
    paths = os.pathsep.join([str(EXAMPLES.parent), *filter(None, sys.path)])
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, str(EXAMPLES / "fastapi_service.py"), "--port", "0"],
            stdout=output, stderr=subprocess.STDOUT, cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths},
        )  # fmt: skip

    def port():
        assert process.poll() is None, log.read_text()
        return re.search(r"running on http://127\.0\.0\.1:(\d+)", log.read_text())

    try:
        yield int(until(port, "the service starts")[1])
        process.terminate()
        process.wait(PATIENCE)
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.wait(PATIENCE)


def test_a_service_explains_beside_predicting(service):
    def ask(query, data):
        connection = http.client.HTTPConnection("127.0.0.1", service, timeout=PATIENCE)
        try:
            connection.request("POST", f"/explain{query}", data)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    scene = zoo.scenes()[264].image
    file = io.BytesIO()
    scene.save(file, "PNG")
    for query, arguments in (("", {}), ("?target=trouser", {"target": "trouser"}), ("?top_k=2", {"top_k": 2})):
        status, answer = ask(query, file.getvalue())
        here = explain("swin-mini", scene, **arguments)
        here = here if isinstance(here, tuple) else (here,)
        assert status == 200
        assert answer["prediction"] == here[0].label(here[0].prediction)
        assert [each["class"] for each in answer["maps"]] == [each.label(each.target) for each in here]
        for each, own in zip(answer["maps"], here, strict=True):
            assert each["confidence"] == pytest.approx(own.confidence, rel=1e-4)
            kind, _, data = each["overlay"].partition(",")
            assert kind == "data:image/png;base64"
            shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
            assert np.abs(shown.astype(int) - np.asarray(own.overlay)).max() <= 1

    status, answer = ask("", b"text")
    assert (status, answer["detail"][:20]) == (422, "the body is no image")
    status, answer = ask("?target=troser", file.getvalue())
    assert (status, answer["detail"]) == (422, "unknown class 'troser'; did you mean 'trouser'?")
    assert ask("?top_k=2&target=bag", file.getvalue())[0] == 422
    assert ask("?top_k=9", file.getvalue())[0] == 422
    large = io.BytesIO()
    Image.new("1", (8000, 8000)).save(large, "PNG")
    assert ask("", large.getvalue()) == (413, {"detail": "the image has more than 40000000 pixels"})
    assert ask("", bytes(10 * 2**20 + 1)) == (413, {"detail": "the image has more than 10485760 bytes"})
    assert ask("", file.getvalue())[0] == 200  # it is still there
