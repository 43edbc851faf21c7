"""Pictures on demand: runtimes opened when first used, one drawing at a time, drafts kept."""

from __future__ import annotations

import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tiue_export.drawing.picture import save_png
from tiue_export.drawing.pipeline import Job, Pipeline
from tiue_export.errors import UsageError
from tiue_export.sampling.noise import check_seeds
from tiue_export.specs import Array
from tiue_export.system.disk_errors import disk_errors

from ..draw.generate import slug
from .choices import Choice
from .stoppable import Stale, stoppable

MAX_COUNT = 16
# Two are compared at a time; more would hold the weights of each in memory.
_OPEN_PIPELINES = 2
_DRAFTS = 128
_HISTORY = 120
_WAIT_S = 0.05


@dataclass(frozen=True)
class Drawn:
    """One picture on disk, with its parameters inside; `latents` (4, H, W) float32.

    `stage_latency_ms` is the time of the run it came from, `batch` the pictures of that run.
    """

    path: Path
    parameters: Mapping[str, Any]
    stage_latency_ms: Mapping[str, float]
    batch: int
    latents: Array


class Steering(NamedTuple):
    """What only bundles of Faster Diffusion take; `guidance` None is the bundle's own."""

    negative: str = ""
    guidance: float | None = None


NOT_STEERED = Steering()


def never() -> bool:
    """A drawing that nothing replaces."""
    return False


# Label of the choice, prompt, steering, seed.
_Key = tuple[str, str, Steering, int]


class Drawer:
    """Draws with any choice; drafts lie in `drafts`, what is kept in `kept`, both as PNG files."""

    def __init__(self, drafts: Path, kept: Path) -> None:
        self.kept = kept
        self.drafts = drafts.resolve()
        self._device = threading.Lock()
        self._pipelines: OrderedDict[str, Pipeline] = OrderedDict()
        self._drafts: OrderedDict[_Key, Drawn] = OrderedDict()
        self._made = 0

    def draw(
        self,
        choice: Choice,
        prompt: str,
        seed: int,
        count: int = 1,
        is_stale: Callable[[], bool] = never,
        steering: Steering = NOT_STEERED,
    ) -> Iterator[Drawn]:
        """Draw `count` pictures, seeds from `seed` up; those drawn before come from the drafts.

        Raises `Stale` as soon as `is_stale()` is true, before or between two graphs.
        """
        if not 1 <= count <= MAX_COUNT:
            raise UsageError(f"count is {count}; expected 1 to {MAX_COUNT}")
        check_seeds(seed, count)
        seeds = list(range(seed, seed + count))
        while seeds:
            key = (choice.label, prompt, steering, seeds[0])
            known = self._drafts.get(key)
            if known is not None:
                self._drafts.move_to_end(key)
                seeds = seeds[1:]
                yield known
                continue
            with self._pipeline(choice, is_stale) as pipeline:
                batch = seeds[: pipeline.batch_range()[1]]
                jobs = [Job(prompt, each, *steering) for each in batch]
                drawn = self._run(choice, pipeline, jobs, steering)
            seeds = seeds[len(batch) :]
            yield from drawn

    def measure(self, choice: Choice, prompt: str, seed: int) -> dict[str, float]:
        """One more run of all graphs, for its time alone: milliseconds of each stage."""
        with self._pipeline(choice, never) as pipeline:
            result = pipeline.forgetful()(prompt, seed=seed)
        return {stage: sum(times) for stage, times in result.stage_latency_ms.items()}

    def cut_note(self, choice: Choice, prompt: str) -> str | None:
        """What of the prompt the text encoder will not see; None: it sees all."""
        with self._pipeline(choice, never) as pipeline:
            return pipeline.tokenizer.cut_note(prompt)

    def keep(self, drawn: Sequence[Drawn]) -> list[Path]:
        """Copy drafts into the history, under names that tell prompt and seed."""
        paths = []
        for picture in drawn:
            path = self._kept_path(picture)
            if not path.exists():
                with disk_errors(path):
                    self.kept.mkdir(parents=True, exist_ok=True)
                    partial = path.with_name(f".{path.name}.partial")
                    shutil.copyfile(picture.path, partial)
                    partial.replace(path)
            paths.append(path)
        return paths

    def history(self) -> list[Path]:
        """What was kept, newest first, at most 120."""
        if not self.kept.is_dir():
            return []
        files = [path for path in self.kept.glob("*.png") if not path.name.startswith(".")]
        return sorted(files, key=lambda path: path.stat().st_mtime_ns, reverse=True)[:_HISTORY]

    def close(self) -> None:
        """Close every runtime."""
        with self._device:
            while self._pipelines:
                self._pipelines.popitem()[1].close()

    @contextmanager
    def _pipeline(self, choice: Choice, is_stale: Callable[[], bool]) -> Iterator[Pipeline]:
        """The device for one run, as soon as it is free; those who gave up meanwhile leave."""
        while not self._device.acquire(timeout=_WAIT_S):
            if is_stale():
                raise Stale
        try:
            if is_stale():
                raise Stale
            yield stoppable(self._opened(choice), is_stale)
        finally:
            self._device.release()

    def _opened(self, choice: Choice) -> Pipeline:
        pipeline = self._pipelines.get(choice.label)
        if pipeline is None:
            while len(self._pipelines) >= _OPEN_PIPELINES:
                self._pipelines.popitem(last=False)[1].close()
            pipeline = Pipeline.open(choice.bundle, choice.runtime, choice.options)
            self._pipelines[choice.label] = pipeline
        self._pipelines.move_to_end(choice.label)
        return pipeline

    def _run(
        self, choice: Choice, pipeline: Pipeline, jobs: Sequence[Job], steering: Steering
    ) -> list[Drawn]:
        """One run of the graphs, every picture of it written."""
        result = pipeline.draw(jobs)
        latency_ms = {stage: sum(times) for stage, times in result.stage_latency_ms.items()}
        drawn = []
        for job, picture in zip(jobs, result.pictures, strict=True):
            self._made += 1
            parameters = picture.parameters
            path = self.drafts / f"{self._made:05d}-{_name(parameters)}"
            with disk_errors(path):
                save_png(picture.image, path, parameters)
            made = Drawn(path, parameters, latency_ms, len(jobs), picture.latents)
            self._remember((choice.label, job.prompt, steering, job.seed), made)
            drawn.append(made)
        return drawn

    def _remember(self, key: _Key, drawn: Drawn) -> None:
        self._drafts[key] = drawn
        while len(self._drafts) > _DRAFTS:
            self._drafts.popitem(last=False)[1].path.unlink(missing_ok=True)

    def _kept_path(self, picture: Drawn) -> Path:
        """The same picture is kept once: its draft's time and number are part of the name."""
        made = time.strftime("%Y%m%d-%H%M%S", time.localtime(picture.path.stat().st_mtime))
        return self.kept / f"{made}-{picture.path.name}"


def _name(parameters: Mapping[str, Any]) -> str:
    return f"{slug(str(parameters['prompt']))}-seed{parameters['seed']}.png"
