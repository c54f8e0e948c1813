"""A service that explains beside predicting: an image comes in, classes and the maps that argued for them go out.

``pip install fastapi uvicorn`` (``captum-lnstat[demo]`` brings both), then

    python examples/fastapi_service.py --model vit_small_patch16_224 --port 8000
    curl --data-binary @cat.jpg "http://127.0.0.1:8000/explain?top_k=2"
    curl --data-binary @cat.jpg "http://127.0.0.1:8000/explain?target=tabby%20cat"

The answer is JSON: ``prediction``, ``confidence``, and ``maps``, a list of ``class``, ``confidence`` and ``overlay``,
the picture as a data URI that an ``<img>`` shows. The service listens on this machine alone; before others, put a
server that knows who may ask, and how often.
"""

from __future__ import annotations

import argparse
import base64
import io
import threading
import warnings
from typing import Annotated, Any

import timm
import uvicorn
from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.concurrency import run_in_threadpool
from PIL import Image
from torch import nn

from captum_lnstat import SourceError, explain, zoo

MAX_BYTES, MAX_PIXELS = 10 * 2**20, 40_000_000


def create_app(model: nn.Module | zoo.ReferenceModel) -> FastAPI:
    """The service of one model, in eval mode, wherever it computes."""
    app = FastAPI(title="captum-lnstat")
    turn = threading.Lock()  # one image at a time: a model that is busy is no faster for being asked twice

    @app.post("/explain")
    async def explained(
        request: Request, target: str | None = None, top_k: Annotated[int | None, Query(ge=1, le=5)] = None
    ) -> dict[str, Any]:
        data = await body(request)
        return await run_in_threadpool(answer, data, target, top_k)

    def answer(data: bytes, target: str | None, top_k: int | None) -> dict[str, Any]:
        image = read(data)
        try:
            with turn:
                found = explain(model, image, target, top_k=top_k)
        except SourceError as error:  # no such class, say: the message is for whoever asked
            raise HTTPException(422, str(error)) from None
        maps = (found,) if top_k is None else found
        first = maps[0]
        return {
            "prediction": first.label(first.prediction),
            "confidence": None if first.probabilities is None else float(first.probabilities[first.prediction]),
            "maps": [
                {"class": each.label(each.target), "confidence": each.confidence, "overlay": address(each.overlay)}
                for each in maps
            ],
        }

    return app


async def body(request: Request) -> bytes:
    """What was sent, no more of it than is allowed."""
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > MAX_BYTES:
            raise HTTPException(413, f"the image has more than {MAX_BYTES} bytes")
    return bytes(data)


def read(data: bytes) -> Image.Image:
    """The image of a file; its size is looked at before it is decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
        if image.width * image.height > MAX_PIXELS:
            raise HTTPException(413, f"the image has more than {MAX_PIXELS} pixels")
        image.load()
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError):
        raise HTTPException(422, "the body is no image; expected the bytes of a file such as a JPEG or PNG") from None
    return image


def address(picture: Image.Image) -> str:
    """A picture as a data URI."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="swin-mini", help="of the package, or of timm with its trained weights")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    own = options.model in zoo.names()
    model = zoo.load(options.model) if own else timm.create_model(options.model, pretrained=True).eval()
    uvicorn.run(create_app(model), host="127.0.0.1", port=options.port)


if __name__ == "__main__":
    main()
