"""Prompts -> what each graph is fed while they are drawn: files that ranges are measured on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from tiue_export.bundle.read import Bundle
from tiue_export.drawing.pipeline import Pipeline
from tiue_export.registry.backends import open_runtime
from tiue_export.specs import Array, Feeds, Runtime, RuntimeOptions

# Of a graph that runs in many passes, so many runs are measured, evenly over them all.
_RUNS = 64


class FeedsRecorder:
    """A runtime that writes down what its graphs are fed, beside running them.

    A decoder of a loop takes `steps` timesteps at once; runs of fewer are not written.
    """

    name, device, precision = "ort", "cpu", "fp32"

    def __init__(self, exact: Runtime, folder: Path, steps: int) -> None:
        self._exact, self._folder, self._steps = exact, folder, steps
        self._runs: dict[str, int] = {}

    def step_limit(self) -> int:
        """As many as the decoder's context takes."""
        return self._steps

    def run(self, graph: str, feeds: Feeds) -> dict[str, Array]:
        """As the exact runtime does."""
        from safetensors.numpy import save

        if len(feeds.get("timesteps", ())) not in (0, self._steps):
            return self._exact.run(graph, feeds)
        number = self._runs.get(graph, 0)
        self._runs[graph] = number + 1
        arrays = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
        # Not save_file, whose error on a full disk is no OSError.
        (self._folder / f"{graph}-{number:05d}.safetensors").write_bytes(save(arrays))
        return self._exact.run(graph, feeds)

    def close(self) -> None:
        """Close the exact runtime."""
        self._exact.close()


def record_feeds(
    bundle: Bundle,
    prompts: Sequence[str],
    folder: Path,
    steps: int = 1,
    on_prompt: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Draw each prompt once, in float32 on ONNX Runtime; GRAPH-NNNNN.safetensors in `folder`."""
    exact = open_runtime("ort", bundle, RuntimeOptions(device="cpu"))
    recorder = FeedsRecorder(exact, folder, steps)
    try:
        pipeline = Pipeline.open(bundle, recorder)
        for number, prompt in enumerate(prompts):
            pipeline(prompt, seed=number)
            on_prompt(number + 1, len(prompts))
    finally:
        recorder.close()


def feeds_files(folder: Path, graph: str) -> list[str]:
    """The files of one graph's runs, at most 64 of them."""
    files = sorted(str(file.resolve()) for file in folder.glob(f"{graph}-?????.safetensors"))
    chosen = np.unique(np.linspace(0, len(files) - 1, min(_RUNS, len(files))).round().astype(int))
    return [files[number] for number in chosen]
