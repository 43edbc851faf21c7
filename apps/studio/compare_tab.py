"""The tab that compares two ways of drawing one picture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from tiue_export.errors import TiueError
from tiue_export.sampling.noise import MAX_SEED

from . import markup
from .comparison import compare
from .draw_tab import Studio

_ONE_CHOICE = (
    "There is one way to draw here, so nothing to compare. Add another: "
    "tiue-export openvino --bundle BUNDLE, or give the studio a second bundle."
)


class CompareTab:
    """The tab's components and its one event."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        labels = [choice.label for choice in studio.offer.choices]
        several = len(labels) > 1
        with gr.Row(equal_height=True):
            self.prompt = gr.Textbox(
                label="Prompt",
                placeholder="a red fox in the snow",
                max_length=2000,
                scale=5,
                elem_id="tiue-compare-prompt",
            )
            self.seed = gr.Number(
                0,
                label="Seed",
                precision=0,
                minimum=0,
                maximum=MAX_SEED,
                scale=1,
                min_width=110,
                elem_id="tiue-compare-seed",
            )
        with gr.Row(equal_height=True):
            self._left = gr.Dropdown(
                labels, value=labels[0], label="Left (reference)", elem_id="tiue-left"
            )
            self._right = gr.Dropdown(labels, value=labels[-1], label="Right", elem_id="tiue-right")
            self._runs = gr.Slider(
                1, 10, 3, step=1, label="Timed runs", min_width=150, elem_id="tiue-runs"
            )
            self._button = gr.Button(
                "Compare",
                variant="primary",
                interactive=several,
                min_width=110,
                elem_id="tiue-compare",
            )
        with gr.Row():
            with gr.Column(min_width=300):
                self._slider = gr.ImageSlider(
                    label="Drag: left | right",
                    format="png",
                    type="filepath",
                    interactive=False,
                    max_height=640,
                    elem_id="tiue-slider",
                )
            with gr.Column(min_width=300):
                self._difference = gr.Image(
                    label="Difference",
                    format="png",
                    interactive=False,
                    buttons=["fullscreen"],
                    elem_id="tiue-difference",
                )
        start = "Same prompt, same seed, two runtimes or precisions."
        self._report = gr.HTML(
            markup.message(start if several else _ONE_CHOICE), elem_id="tiue-report"
        )

    def connect(self) -> None:
        """Attach the events; called once, inside the page."""
        form = [self.prompt, self.seed, self._left, self._right, self._runs]
        shown = [self._slider, self._difference, self._report]
        for event in (self._button.click, self.prompt.submit):
            event(self._compare, form, shown, show_progress="hidden")

    def _compare(
        self, prompt: str | None, seed: float | None, left: str, right: str, runs: float
    ) -> Iterator[tuple[Any, ...]]:
        """Pictures first, then the report again after each pair of timed runs."""
        if not prompt or not prompt.strip():
            yield gr.skip(), gr.skip(), markup.message("Type a prompt first.", "error")
            return
        yield gr.skip(), gr.skip(), markup.message("Drawing both ...", "busy")
        offer, first = self._studio.offer, True
        try:
            sides = (offer.choice(left), offer.choice(right))
            for found in compare(self._studio.drawer, *sides, prompt, int(seed or 0), int(runs)):
                if first:
                    pair = (str(found.left.path), str(found.right.path))
                    label = f"Difference, {found.amplification} times amplified"
                    if found.max_levels == 0:
                        label = "Difference: none"
                    yield pair, gr.Image(value=found.difference, label=label), gr.skip()
                first = False
                yield gr.skip(), gr.skip(), markup.comparison_page(found)
        except TiueError as error:
            yield gr.skip(), gr.skip(), markup.problem(error)
