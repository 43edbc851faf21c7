"""The studio's page: three tabs, its style and its keys, all served from this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from . import markup
from .compare_tab import CompareTab
from .draw_tab import DrawTab, Studio

_HERE = Path(__file__).parent
_KEYS = (
    "Keys: **Enter** keeps · **/** prompt · **r** random seed · **[** **]** seed before, after · "
    "**Alt+1 2 3** tabs"
)


def build_page(studio: Studio) -> Any:
    """The page as a Gradio application, not served yet."""
    with gr.Blocks(
        title="tiue-export studio", analytics_enabled=False, delete_cache=(600, 3600)
    ) as page:
        with gr.Tabs(elem_id="tiue-tabs"):
            with gr.Tab("Draw", id="draw"):
                draw = DrawTab(studio)
                gr.Markdown(_KEYS, elem_id="tiue-keys")
            with gr.Tab("Compare", id="compare") as compare_page:
                compare = CompareTab(studio)
            with gr.Tab("Bundle", id="bundle"):
                _bundle_tab(studio)
        draw.connect(page)
        compare.connect()
        compare_page.select(
            lambda drawn, seed, own: (drawn or own, seed),
            [draw.prompt, draw.seed, compare.prompt],
            [compare.prompt, compare.seed],
            show_progress="hidden",
        )
    return page


def _bundle_tab(studio: Studio) -> None:
    """One bundle's manifest; with several, the one chosen."""
    by_name = {str(choice.bundle.root): choice for choice in studio.offer.choices}
    names = list(by_name)
    chosen = gr.Dropdown(
        names, value=names[0], label="Bundle", visible=len(names) > 1, elem_id="tiue-bundle"
    )
    shown = gr.HTML(markup.bundle_page(by_name[names[0]], studio.offer), elem_id="tiue-manifest")
    chosen.input(
        lambda name: markup.bundle_page(by_name[name], studio.offer),
        chosen,
        shown,
        show_progress="hidden",
    )


def appearance() -> dict[str, Any]:
    """Theme, style and keys, for mounting. System fonts: none is fetched from anywhere."""
    theme = gr.themes.Base(
        primary_hue="orange",
        neutral_hue="stone",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    script = (_HERE / "studio.js").read_text("utf-8")
    return {
        "theme": theme,
        "css": (_HERE / "studio.css").read_text("utf-8"),
        "head": f"<script>{script}</script>",
    }
