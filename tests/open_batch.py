"""A bundle whose batch axis is open, without exporting one: for what reads specs alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tiue_export.bundle.read import Bundle
from tiue_export.specs import BATCH


def with_open_batch(bundle: Bundle) -> Bundle:
    """The bundle's manifest with a dynamic batch; its ONNX files keep their own, so run them not.

    The fake runtime draws from it, as it draws from specs.
    """
    manifest = bundle.manifest

    def opened(tensors: Any) -> Any:
        return tuple(replace(tensor, shape=(BATCH, *tensor.shape[1:])) for tensor in tensors)

    graphs = {
        name: replace(graph, inputs=opened(graph.inputs), outputs=opened(graph.outputs))
        for name, graph in manifest.graphs.items()
    }
    return replace(
        bundle,
        manifest=replace(
            manifest,
            graphs=graphs,
            latent_shape=(BATCH, *manifest.latent_shape[1:]),
            text_shape=(BATCH, *manifest.text_shape[1:]),
        ),
    )
