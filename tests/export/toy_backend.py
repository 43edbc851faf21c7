"""A whole backend: GRAPH.toy is the ONNX graph as one compressed file, run by ONNX Runtime."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from typing import ClassVar

from tiue_export.bundle.manifest import Compiled
from tiue_export.bundle.read import Bundle
from tiue_export.export.backend import Backend, Convert, GraphForm, compile_form, form_identity
from tiue_export.registry.backends import BACKENDS, BackendEntry
from tiue_export.specs import Array, Feeds, RuntimeOptions


class ToyBackend(Backend):
    runtime: ClassVar[str] = "toy"
    title: ClassVar[str] = "toy graphs"
    folder: ClassVar[str] = "toy"

    def check(self, bundle: Bundle) -> None:
        pass

    def form(self, bundle: Bundle) -> Compiled:
        return Compiled("toy", "1", {"device": "any"}, {}, {})

    def identity(self, bundle: Bundle, graph: str) -> str:
        return form_identity(bundle, graph, version="1")

    @contextlib.contextmanager
    def converter(self, workshop) -> Iterator[Convert]:
        def convert(graph: str) -> GraphForm:
            import onnx

            model = onnx.load(workshop.bundle.graph_path(graph))
            content = zlib.compress(model.SerializeToString())
            (workshop.folder / f"{graph}.toy").write_bytes(content)
            return GraphForm(f"{graph}.toy", (f"{graph}.toy",))

        yield convert

    def trials(self) -> tuple[RuntimeOptions, ...]:
        return (RuntimeOptions(),)


def compile_toy(bundle: Bundle, **driven) -> Bundle:
    return compile_form(bundle, ToyBackend(), **driven)


class ToyRuntime:
    name, device, precision = "toy", "box", "fp32"

    def __init__(self, bundle: Bundle, options: RuntimeOptions) -> None:
        self.bundle = bundle

    def run(self, graph: str, feeds: Feeds) -> dict[str, Array]:
        import onnxruntime

        spec = self.bundle.spec(graph)
        path = self.bundle.root / self.bundle.manifest.compiled["toy"].graphs[graph].path
        session = onnxruntime.InferenceSession(zlib.decompress(path.read_bytes()))
        names = [tensor.name for tensor in spec.outputs]
        return dict(zip(names, session.run(names, spec.select(feeds)), strict=True))

    def close(self) -> None:
        pass


TOY = BackendEntry(
    title="Toy",
    summary="toys in a box",
    opener="toy_backend:ToyRuntime",
    needs=("onnxruntime",),
    extra="export",
    device_words=("box",),
    folders=("toy",),
    exporter="toy_backend:compile_toy",
    export_needs=("onnx",),
    packages=("tiue-export",),
    caches={"toy": "toys put away"},
    devices={"toybox": "Box of toys: Toy"},
)
BACKENDS["toy"] = TOY  # type: ignore[index]  # in the program this is a line of the table
