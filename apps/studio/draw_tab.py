"""The tab that draws: a picture while one types, the form, what was kept, pictures brought back."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from tiue_export.errors import TiueError
from tiue_export.sampling.noise import MAX_SEED

from . import markup
from .choices import Offer
from .drawing import MAX_COUNT, NOT_STEERED, Drawer, Drawn, Steering
from .recovery import Recovered, recover
from .stoppable import Stale
from .turns import Turns, still_wanted

# Long enough that a word typed at ease is one request, short enough to feel immediate.
_PAUSE_S = 0.25
# Runs in the page at each event: the last input becomes the count of the page's requests.
_COUNT_REQUESTS = """(...form) => {
  window.tiueRequests = (window.tiueRequests ?? 0) + 1;
  return [...form.slice(0, -1), window.tiueRequests];
}"""
_EMPTY = "Type a prompt: the picture follows. Enter keeps it in the history."

# What a generator shows, one value for each output.
_Outputs = Iterator[tuple[Any, ...]]


@dataclass(frozen=True)
class Studio:
    """What the tabs share."""

    offer: Offer
    drawer: Drawer
    turns: Turns


@dataclass(frozen=True)
class _Asked:
    """The form when an event came."""

    prompt: str
    seed: int
    count: int
    label: str
    steering: Steering


class DrawTab:
    """The tab's components, and what each event does to them."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        first = studio.offer.choices[0]
        self._sizes = list(dict.fromkeys(choice.size for choice in studio.offer.choices))
        self.prompt = gr.Textbox(
            label="Prompt",
            placeholder="a red fox in the snow",
            lines=1,
            max_lines=4,
            max_length=2000,
            autofocus=True,
            submit_btn="Draw",
            elem_id="tiue-prompt",
        )
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                self._gallery = gr.Gallery(
                    label="Pictures",
                    show_label=False,
                    columns=1,
                    object_fit="contain",
                    height=None,
                    format="png",
                    buttons=["fullscreen"],
                    elem_id="tiue-pictures",
                )
                self._status = gr.HTML(markup.message(_EMPTY), elem_id="tiue-status")
                self._download = gr.DownloadButton(
                    "Download PNG", size="sm", interactive=False, elem_id="tiue-download"
                )
            with gr.Column(scale=2, min_width=280):
                self._form(first.size)
        with gr.Accordion("History: what Enter or Draw kept", open=True):
            self._history = gr.Gallery(
                label="History",
                show_label=False,
                columns=8,
                fit_columns=False,
                height=None,
                object_fit="cover",
                allow_preview=False,
                format="png",
                buttons=[],
                elem_id="tiue-history",
            )
        self._sent = gr.Number(0, visible=False)
        self._kept = gr.State([])
        self._shown = gr.State([])

    def _form(self, size: str) -> None:
        self.seed = gr.Number(
            0,
            label="Seed",
            info="Picture i has seed + i",
            precision=0,
            minimum=0,
            maximum=MAX_SEED,
            elem_id="tiue-seed",
        )
        with gr.Row(elem_classes="tiue-buttons"):
            self._previous = gr.Button("-1", size="sm", min_width=48, elem_id="tiue-previous")
            self._next = gr.Button("+1", size="sm", min_width=48, elem_id="tiue-next")
            self._random = gr.Button("Random", size="sm", min_width=80, elem_id="tiue-random")
        self._count = gr.Slider(1, MAX_COUNT, 1, step=1, label="Pictures", elem_id="tiue-count")
        with gr.Row():
            self._size = gr.Dropdown(
                self._sizes,
                value=size,
                label="Size",
                interactive=len(self._sizes) > 1,
                min_width=110,
                scale=1,
                elem_id="tiue-size",
            )
            labels = self._studio.offer.of_size(size)
            self._runtime = gr.Dropdown(
                labels,
                value=labels[0],
                label="Runtime and precision",
                min_width=150,
                scale=2,
                elem_id="tiue-runtime",
            )
        with gr.Row(visible=self._takes_guidance(labels[0]), elem_id="tiue-steering") as steering:
            self._guidance = gr.Number(
                None,
                label="Guidance",
                info="Empty: default",
                min_width=110,
                scale=1,
                elem_id="tiue-guidance",
            )
            self._negative = gr.Textbox(
                label="Negative prompt",
                info="What the picture shall not show",
                lines=1,
                max_length=2000,
                min_width=150,
                scale=2,
                elem_id="tiue-negative",
            )
        self._steering = steering
        self._drop = gr.File(
            label="Bring a PNG back: its parameters return",
            file_types=[".png"],
            type="filepath",
            height=150,
            elem_id="tiue-drop",
        )
        self._note = gr.HTML("", elem_id="tiue-note")

    def connect(self, page: Any) -> None:
        """Attach the events; called once, inside the page."""
        steering = [self._guidance, self._negative]
        fields = [self.prompt, self.seed, self._count, self._runtime, *steering]
        form = [*fields, self._sent]
        shown = [self._gallery, self._status, self._download, self._shown]
        kept = [self._history, self._kept]
        quiet: dict[str, Any] = {
            "show_progress": "hidden",
            "concurrency_limit": None,
            "trigger_mode": "multiple",
            "js": _COUNT_REQUESTS,
        }
        # Gradio's "input" misses pasting, dictation and the keyboards of phones; "change" does not.
        for field in fields:
            field.change(self._answered(self._live), form, shown, **quiet)
        self._runtime.change(
            lambda label: gr.Row(visible=self._takes_guidance(label)),
            self._runtime,
            self._steering,
            show_progress="hidden",
        )
        self.prompt.submit(self._answered(self._final), form, [*shown, *kept], **quiet)
        moves: tuple[tuple[Any, Callable[..., Any]], ...] = (
            (self._previous, lambda seed: max(0, int(seed or 0) - 1)),
            (self._next, lambda seed: min(MAX_SEED, int(seed or 0) + 1)),
            (self._random, lambda seed: secrets.randbelow(2**31)),
        )
        for button, move in moves:
            button.click(move, self.seed, self.seed, show_progress="hidden")
        self._size.input(self._sized, self._size, self._runtime, show_progress="hidden")
        self._gallery.select(self._selected, self._shown, self._download, show_progress="hidden")
        filled = [
            *(self.prompt, self.seed, self._count, self._size, self._runtime),
            *(self._guidance, self._negative, self._note),
        ]
        self._drop.upload(self._dropped, self._drop, [*filled, self._drop], show_progress="hidden")
        self._history.select(self._reopened, self._kept, filled, show_progress="hidden")
        page.load(self._listed, None, kept, show_progress="hidden")

    def _takes_guidance(self, label: str) -> bool:
        """Whether that choice draws by Faster Diffusion: a student's guidance is in its weights."""
        return self._studio.offer.choice(label).bundle.manifest.plan.guidance is not None

    def _answered(self, answer: Callable[[_Asked, Callable[[], bool]], _Outputs]) -> Any:
        """`answer` as Gradio calls it, with the form's fields; emptied ones hold None."""

        def event(
            prompt: str | None,
            seed: float | None,
            count: float,
            label: str,
            guidance: float | None,
            negative: str | None,
            sent: float | None,
            request: gr.Request,
        ) -> _Outputs:
            steering = Steering(negative or "", guidance)
            asked = _Asked(prompt or "", int(seed or 0), int(count), label, steering)
            yield from answer(asked, self._studio.turns.take(str(request.session_hash), sent or 0))

        return event

    def _live(self, asked: _Asked, is_stale: Callable[[], bool]) -> _Outputs:
        """Draw after a pause in the typing; what is older gives up."""
        if still_wanted(is_stale, _PAUSE_S):
            for _, shown in self._drawing(asked, is_stale):
                yield shown

    def _final(self, asked: _Asked, is_stale: Callable[[], bool]) -> _Outputs:
        """Draw at once, and keep what was drawn."""
        drawn: list[Drawn] = []
        for so_far, shown in self._drawing(asked, is_stale):
            drawn = so_far
            yield (*shown, gr.skip(), gr.skip())
        if len(drawn) == asked.count:
            try:
                self._studio.drawer.keep(drawn)
            except TiueError as error:
                yield (gr.skip(), markup.problem(error), *[gr.skip()] * 4)
                return
            yield (*[gr.skip()] * 4, *self._listed())

    def _drawing(
        self, asked: _Asked, is_stale: Any
    ) -> Iterator[tuple[list[Drawn], tuple[Any, ...]]]:
        """Pictures as they come, each time with the gallery, status, download and state."""
        prompt, wanted, drawer = asked.prompt, asked.count, self._studio.drawer
        if not prompt.strip():
            yield [], (gr.Gallery(value=[]), markup.message(_EMPTY), _no_download(), [])
            return
        drawn: list[Drawn] = []
        try:
            choice = self._studio.offer.choice(asked.label)
            steering = asked.steering if self._takes_guidance(asked.label) else NOT_STEERED
            yield drawn, (gr.skip(), markup.message("Drawing ...", "busy"), gr.skip(), gr.skip())
            cut = drawer.cut_note(choice, prompt)
            for picture in drawer.draw(choice, prompt, asked.seed, wanted, is_stale, steering):
                drawn = [*drawn, picture]
                if is_stale():
                    return
                yield drawn, self._shown_as(drawn, wanted, cut)
        except Stale:
            return
        except TiueError as error:
            yield [], (gr.skip(), markup.problem(error), gr.skip(), gr.skip())

    def _shown_as(self, drawn: list[Drawn], wanted: int, cut: str | None) -> tuple[Any, ...]:
        items = [(str(p.path), f"seed {p.parameters['seed']}") for p in drawn]
        columns = 1 if wanted == 1 else 2 if wanted <= 4 else 4
        return (
            gr.Gallery(value=items, columns=columns, selected_index=None),
            markup.drawn_line(drawn, wanted, cut),
            _download(drawn[0].path),
            [str(picture.path) for picture in drawn],
        )

    def _selected(self, shown: list[str], event: gr.SelectData) -> Any:
        """The picture one looks at is the one to download."""
        index = int(event.index)
        return _download(Path(shown[index])) if index < len(shown) else gr.skip()

    def _sized(self, size: str) -> Any:
        labels = self._studio.offer.of_size(size)
        return gr.Dropdown(choices=labels, value=labels[0])

    def _listed(self) -> tuple[Any, Any]:
        paths = self._studio.drawer.history()
        return [str(path) for path in paths], [str(path) for path in paths]

    def _dropped(self, path: str | None) -> tuple[Any, ...]:
        return (*self._recovered(Path(path or "")), None)

    def _reopened(self, kept: list[str], event: gr.SelectData) -> tuple[Any, ...]:
        index = int(event.index)
        return self._recovered(Path(kept[index] if index < len(kept) else ""))

    def _recovered(self, path: Path) -> tuple[Any, ...]:
        """The form as it was for that picture."""
        try:
            found: Recovered = recover(path, self._studio.offer)
        except TiueError as error:
            raise gr.Error(escape(str(error)), print_exception=False) from error
        note = markup.recovered_line(found)
        negative, guidance = found.steering
        if found.choice is None:
            return found.prompt, found.seed, 1, gr.skip(), gr.skip(), guidance, negative, note
        labels = self._studio.offer.of_size(found.choice.size)
        runtime = gr.Dropdown(choices=labels, value=found.choice.label)
        size = found.choice.size
        return found.prompt, found.seed, 1, size, runtime, guidance, negative, note


def _download(path: Path) -> Any:
    return gr.DownloadButton(value=str(path), interactive=True)


def _no_download() -> Any:
    return gr.DownloadButton(value=None, interactive=False)
