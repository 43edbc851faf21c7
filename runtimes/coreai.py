"""Core AI assets: by Apple's runtime, of the system on macOS 27, elsewhere its interpreter.

Both are reached through the same package (coreai-core, in beta). Its interface is asynchronous; the
runtime has a thread of its own in which its event loop turns, so that it can be used from anywhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

import numpy as np
from coreai.authoring.asset import AIModelAsset
from coreai.runtime import NDArray

from tiue_export.bundle.read import Bundle
from tiue_export.errors import BundleError, RuntimeFailure, UsageError, first_line, unknown_name
from tiue_export.specs import Array, Feeds, RuntimeOptions, check_finite
from tiue_export.system.command_line import command_line

_FOLDER = "coreai"
_MAIN = "main"
T = TypeVar("T")


class CoreaiRuntime:
    """One model per graph, loaded on first use and kept."""

    name = "coreai"

    def __init__(self, bundle: Bundle, options: RuntimeOptions) -> None:
        self.precision = str(bundle.manifest.compiled[_FOLDER].flags["precision"])
        place = "core ai" if sys.platform == "darwin" else "interpreter"
        self.device = f"{place} {self.precision}"
        self._bundle, self._keep = bundle, not options.low_memory
        self._models: dict[str, _Model] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._closed = False

    def run(self, graph: str, feeds: Feeds) -> dict[str, Array]:
        """Run one graph; outputs are fresh arrays, finite, and fit the bundle's contract."""
        if self._closed:
            raise RuntimeFailure("the coreai runtime is closed", "Open it again.")
        spec = self._bundle.spec(graph)
        pool = spec.select(feeds)
        try:
            if graph not in self._models:
                self._models[graph] = self._wait(self._load(graph))
            outputs = self._wait(self._models[graph].run(pool))
        except (RuntimeError, ValueError, TypeError, OSError) as error:
            raise RuntimeFailure(f"Core AI failed in {graph}: {first_line(error)}") from error
        if not self._keep:
            self._unload()
        fresh = {
            tensor.name: np.array(outputs[tensor.name], tensor.dtype) for tensor in spec.outputs
        }
        check_finite(graph, fresh)
        return fresh

    def step_limit(self) -> int | None:
        """The decoder's asset takes one step of a loop at once."""
        return None if self._bundle.manifest.plan.one_pass else 1

    def close(self) -> None:
        """Drop all models and their memory."""
        if self._closed:
            return
        self._closed = True
        self._unload()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _load(self, graph: str) -> _Model:
        form = self._bundle.manifest.compiled[_FOLDER].graphs[graph]
        asset = AIModelAsset.load((self._bundle.root / form.path).parent)
        scope = contextlib.AsyncExitStack()
        with _silent():
            model = await scope.enter_async_context(asset.executable())
            return _Model(model.load_function(_MAIN), scope)

    def _unload(self) -> None:
        for model in self._models.values():
            self._wait(model.scope.aclose())
        self._models.clear()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


class _Model:
    """A loaded function, and what must be left when it is no longer needed."""

    def __init__(self, function: Any, scope: contextlib.AsyncExitStack) -> None:
        self._function, self.scope = function, scope

    async def run(self, pool: Feeds) -> dict[str, Array]:
        """Arrays in, in the asset's own types, and out."""
        feeds = {}
        for name in self._function.desc.input_names:
            dtype = np.dtype(str(self._function.desc.input_descriptor(name).dtype))
            feeds[name] = NDArray(np.ascontiguousarray(pool[name], dtype))
        outputs = await self._function(feeds)
        return {name: np.asarray(array.numpy()) for name, array in outputs.items()}


def open_runtime(bundle: Bundle, options: RuntimeOptions) -> CoreaiRuntime:
    """Open the bundle's assets, in the precision they were made in."""
    if _FOLDER not in bundle.manifest.compiled:
        raise BundleError(
            f"{bundle.root} has no Core AI assets",
            "Make them: " + command_line("coreai", "--ckpt", "CHECKPOINT", "--bundle", bundle.root),
        )
    if options.threads is not None and options.threads < 1:
        raise UsageError(f"--threads is {options.threads}; expected 1 or more")
    if options.threads is not None:
        raise UsageError("Core AI chooses its threads itself", "Leave --threads out.")
    if options.device not in ("auto", "cpu"):
        raise unknown_name("device", options.device, ("auto", "cpu"))
    made = str(bundle.manifest.compiled[_FOLDER].flags["precision"])
    if options.precision not in ("auto", made):
        raise UsageError(
            f"the Core AI assets of {bundle.root} compute in {made}; got {options.precision}",
            f"Leave --precision out, or make them in {options.precision}: "
            + command_line(
                *("coreai", "--ckpt", "CHECKPOINT", "--bundle", bundle.root),
                *("--precision", options.precision, "--force"),
            ),
        )
    return CoreaiRuntime(bundle, options)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the line that the interpreter writes to file descriptor 2 for each function."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
