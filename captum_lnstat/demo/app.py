"""The page: what is on it, and what happens when it is used. Gradio is imported when the page is built."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from captum_lnstat import zoo
from captum_lnstat.attribution.methods import METHODS
from captum_lnstat.demo import report
from captum_lnstat.demo.photo import DemoError, Photo, from_upload
from captum_lnstat.demo.samples import samples
from captum_lnstat.demo.studio import BESIDE, SUGGESTED, Case, Question, Shown, Studio
from captum_lnstat.rules import layer_rule_names, rule_names

_SWEEP, _AGE = 60, 600  # seconds: how often uploaded files are looked through, and how old they get
_SESSION = 3600  # seconds that the image of a visitor is kept
_TOP, _LISTED = 5, 1000
_HEADER = """
<header><h1>captum-lnstat</h1>
<p>What of an image counted for a class in a vision transformer? Attribution from attention and the statistics of tokens
at the LayerNorms, beside other methods.</p></header>
"""


def style() -> dict[str, Any]:
    """Theme and style sheet, as Gradio's ``launch`` takes them: no font or file from another host."""
    import gradio as gr

    fonts = ["system-ui", "-apple-system", "Segoe UI", "Helvetica", "Arial", "sans-serif"]
    theme = gr.themes.Base(
        primary_hue="indigo", neutral_hue="slate", font=fonts, font_mono=["ui-monospace", "Consolas", "monospace"]
    )
    # Its own grey for what is said on the side is too faint to read.
    theme = theme.set(body_text_color_subdued="*neutral_500", body_text_color_subdued_dark="*neutral_400")
    return {"theme": theme, "css": files(__package__).joinpath("page.css").read_text("utf-8")}


def build(studio: Studio, folder: Path) -> Any:
    """The page as Gradio's ``Blocks``.

    Args:
        studio: What computes.
        folder: Where Gradio puts uploads.
    """
    import gradio as gr

    def explain(case: Case, question: Question) -> Iterator[str]:
        shown: list[Shown] = []
        yield report.results(case, question, shown, question.beside)
        for one in studio.maps(case, question):
            shown.append(one)
            yield report.results(case, question, shown, question.beside[len(shown) - 1 :])

    def start(photo: Photo | None, name: str, weights: str, rule: Any, contrastive: bool, beside: list[str]) -> Any:
        """Another image or model: all there is to choose from changes."""
        ours = gr.update(visible=str(name).strip() not in zoo.names())
        changes: tuple[Any, ...] = None, gr.update(choices=[], value=None), _slider(gr, rule, 1), ours
        if photo is None:
            yield *changes, report.idle()
            return
        try:
            case = studio.case(photo, str(name), pretrained=weights == "pretrained")
            choices = [(f"{case.label(index)}  {case.percent(index)}", index) for index in case.ranked(_LISTED)]
            best = case.prediction
            changes = dict(case.top(_TOP)), gr.update(choices=choices, value=best), _slider(gr, rule, case.depths), ours
            for html in explain(case, Question(best, rule, 0, contrastive, tuple(beside))):
                yield *changes, html
                changes = gr.skip(), gr.skip(), gr.skip(), gr.skip()
        except DemoError as error:
            yield *changes, report.failure(str(error))

    def again(
        photo: Photo | None,
        name: str,
        weights: str,
        target: int | None,
        rule: Any,
        depth: float,
        contrastive: bool,
        beside: list[str],
    ) -> Iterator[Any]:
        """The same image and model, another question."""
        if photo is None:
            yield gr.skip(), report.idle()
            return
        try:
            case = studio.case(photo, str(name), pretrained=weights == "pretrained")
            depth = 0 if rule not in layer_rule_names() else int(depth)
            target = case.prediction if target is None else int(target)
            slider = _slider(gr, rule, case.depths, depth)
            for html in explain(case, Question(target, rule, depth, contrastive, tuple(beside))):
                yield slider, html
                slider = gr.skip()
        except DemoError as error:
            yield gr.skip(), report.failure(str(error))

    def choose(event: gr.SelectData) -> Any:
        index = event.index if isinstance(event.index, int) else -1
        if not 0 <= index < len(samples()):
            raise gr.Error("There is no such sample.", print_exception=False)
        return samples()[index], samples()[index].image()

    def take(upload: dict[str, Any] | None) -> Any:
        try:
            return None if not upload else from_upload(str(upload.get("path")), folder)
        except DemoError as error:
            raise gr.Error(str(error), print_exception=False, title="No image") from None

    def pick(event: gr.SelectData, photo: Photo | None, name: str, weights: str) -> Any:
        """A class, by a click on one of the predictions."""
        try:
            case = studio.case(photo or samples()[0], str(name), pretrained=weights == "pretrained")
        except DemoError:
            return gr.skip()
        return next((index for index in case.ranked(_TOP) if case.label(index) == event.value), case.prediction)

    # Annotations are text here, and Gradio looks for its own type among the globals.
    choose.__annotations__["event"] = pick.__annotations__["event"] = gr.SelectData

    with gr.Blocks(title="captum-lnstat", analytics_enabled=False, delete_cache=(_SWEEP, _AGE)) as page:
        photo = gr.State(samples()[0], time_to_live=_SESSION)
        gr.HTML(_HEADER)
        with gr.Row(elem_id="columns"):
            with gr.Column(scale=2, min_width=300, elem_id="subject"):
                image = gr.Image(
                    samples()[0].image(),
                    label="Image",
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "clipboard"],
                    buttons=[],
                    height=240,
                    elem_id="image",
                )
                gallery = gr.Gallery(
                    [(sample.image(), sample.title) for sample in samples()],
                    label="Samples",
                    show_label=False,
                    columns=6,
                    allow_preview=False,
                    buttons=[],
                    interactive=False,
                    height="auto",
                    elem_id="samples",
                )
                name = gr.Dropdown(
                    [*zoo.names(), *SUGGESTED],
                    value=zoo.names()[0],
                    allow_custom_value=True,
                    label="Model",
                    info="The two minis come with the package, trained. Any other name of timm's can be typed.",
                    elem_id="model",
                )
                weights = gr.Radio(
                    [
                        ("random: shows how it runs", "random"),
                        ("pretrained: timm downloads them", "pretrained"),
                    ],
                    value="random",
                    label="Weights",
                    visible=False,
                    elem_id="weights",
                )
                predictions = gr.Label(num_top_classes=_TOP, label="Predictions", show_heading=False, elem_id="top")
            with gr.Column(scale=5, min_width=320):
                with gr.Row(elem_id="question"):
                    target = gr.Dropdown([], label="Class to explain", filterable=True, min_width=220, elem_id="target")
                    rule = gr.Radio(
                        list(rule_names()), value="lnstat", label="Rule", scale=2, min_width=300, elem_id="rule"
                    )
                with gr.Row(elem_id="options"):
                    depth = gr.Slider(0, 1, 0, step=1, label="Read after block", min_width=220, elem_id="depth")
                    with gr.Column(scale=2, min_width=300):
                        contrastive = gr.Checkbox(
                            label="contrastive: against the other classes", container=False, elem_id="contrastive"
                        )
                        beside = gr.CheckboxGroup(
                            [(METHODS[name].title, name) for name in BESIDE],
                            value=list(BESIDE[:3]),
                            label="Beside it",
                            container=False,
                            elem_id="beside",
                        )
                results = gr.HTML(report.idle(), elem_id="results")

        # One computation at a time; of what is asked for meanwhile, the last.
        shared: dict[str, Any] = {
            "concurrency_id": "studio",
            "concurrency_limit": 1,
            "show_progress": "minimal",
            "show_progress_on": results,
            "api_visibility": "private",
            "trigger_mode": "always_last",
        }
        quick: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        first = [photo, name, weights, rule, contrastive, beside], [predictions, target, depth, weights, results]
        more = [photo, name, weights, target, rule, depth, contrastive, beside], [depth, results]
        gr.on([page.load, name.input, weights.input], start, *first, **shared)
        gallery.select(choose, None, [photo, image], **quick).then(start, *first, **shared)
        image.upload(take, image, photo, preprocess=False, **quick).success(start, *first, **shared)
        image.clear(lambda: None, None, photo, **quick).then(start, *first, **shared)
        gr.on([target.input, rule.input, depth.input, contrastive.input, beside.input], again, *more, **shared)
        predictions.select(pick, [photo, name, weights], target, **quick).then(again, *more, **shared)
    return page.queue(max_size=32)


def _slider(gr: Any, rule: str, depths: int, value: int = 0) -> Any:
    """The depths of a model, where the rule has any but the first."""
    return gr.update(maximum=max(depths - 1, 1), value=value, interactive=depths > 1 and rule in layer_rule_names())
