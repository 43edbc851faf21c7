"""CUDA for the device runtimes: memory, a stream, events, captured graphs; no torch.

A thin layer over cuda-python, `cuda.bindings` or the older `cuda.cudart`. Every call is checked,
and a failure names the call, CUDA's own error, what it was for and what to type next. Memory is
freed by name, never by the garbage collector: a freed pointer that a stream still uses is a crash
far from its cause.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from tiue_export.errors import MissingExtraError, ResourceError, RuntimeFailure, TiueError
from tiue_export.specs import Array

_NO_GPU = {
    "cudaErrorNoDevice",
    "cudaErrorInsufficientDriver",
    "cudaErrorSystemDriverMismatch",
    "cudaErrorStubLibrary",
}
_CHECK_DRIVER = "Check nvidia-smi and `tiue-export doctor`, or run with --runtime ort."
FREE_MEMORY = (
    "Close other programs on this GPU, or export with a smaller --batch, --height or --width; "
    "generate, parity, serve and studio also take --low-memory (one graph in memory at a time). On "
    "a Jetson, close the desktop or restart: its memory can be too fragmented."
)


def cuda_failure(
    call: str, code: str, text: str, purpose: str = "", free: tuple[int, int] | None = None
) -> TiueError:
    """The error for a failed CUDA call.

    `code` is CUDA's name of it (`cudaErrorMemoryAllocation`), `text` its description, `purpose`
    what the call was for, `free` the GPU's (free, total) bytes where they are known.
    """
    prefix = f"{purpose}: " if purpose else ""
    said = f"{call} failed with {code} ({text})"
    if code in ("cudaErrorMemoryAllocation", "CUDA_ERROR_OUT_OF_MEMORY"):
        known = "" if free is None else f"; {_mb(free[0])} of {_mb(free[1])} were free"
        return ResourceError(f"{prefix}the GPU ran out of memory: {said}{known}", FREE_MEMORY)
    if code in _NO_GPU:
        return RuntimeFailure(f"{prefix}no NVIDIA GPU can be used: {said}", _CHECK_DRIVER)
    return RuntimeFailure(f"{prefix}{said}", "Check the GPU with `tiue-export doctor`.")


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.0f} MB"


class Cuda:
    """The CUDA runtime (and driver) API of the current device, each call checked."""

    def __init__(self) -> None:
        self.runtime = _import_first("cuda.bindings.runtime", "cuda.cudart")
        self.driver = _import_first("cuda.bindings.driver", "cuda.cuda")
        self.call("cudaFree", 0)  # makes the device's context, which the driver API needs

    def call(self, name: str, *arguments: Any, purpose: str = "") -> Any:
        """Call a function of either API; its one result, a tuple of several, or None."""
        api = self.driver if name.startswith("cu") and name[2].isupper() else self.runtime
        status, *results = getattr(api, name)(*arguments)
        if int(status) != 0:
            raise self._failure(api, name, status, purpose)
        if not results:
            return None
        return results[0] if len(results) == 1 else tuple(results)

    def release(self, name: str, handle: Any) -> None:
        """Call a function that frees; after a failure it would only say the same thing again."""
        api = self.driver if name.startswith("cu") and name[2].isupper() else self.runtime
        getattr(api, name)(handle)

    def memory_info(self) -> tuple[int, int]:
        """(free, total) bytes of the GPU; on a Jetson those of the system."""
        free, total = self.call("cudaMemGetInfo")
        return int(free), int(total)

    def allocate(self, size_bytes: int, purpose: str) -> DeviceBuffer:
        """Memory on the GPU, 256-byte aligned; `purpose` says in errors which graph wanted it."""
        asked = f"{purpose} ({_mb(size_bytes)})"
        pointer = int(self.call("cudaMalloc", max(1, size_bytes), purpose=asked))
        return DeviceBuffer(self, pointer, size_bytes)

    def allocate_pinned(self, size_bytes: int, purpose: str) -> PinnedBuffer:
        """Host memory that the GPU copies from and to without a detour."""
        asked = f"{purpose} ({_mb(size_bytes)} of pinned host memory)"
        pointer = int(self.call("cudaHostAlloc", max(1, size_bytes), 0, purpose=asked))
        return PinnedBuffer(self, pointer, size_bytes)

    def _failure(self, api: Any, name: str, status: Any, purpose: str) -> TiueError:
        code = getattr(status, "name", str(status))
        if api is self.runtime:
            text = _decoded(api.cudaGetErrorString(status)[1])
            api.cudaGetLastError()  # clears it, or the next call would report it as its own
        else:
            text = _decoded(api.cuGetErrorString(status)[1])
        free = None
        if "MemoryAllocation" in code or "OUT_OF_MEMORY" in code:
            result, *sizes = self.runtime.cudaMemGetInfo()
            free = (int(sizes[0]), int(sizes[1])) if int(result) == 0 else None
        return cuda_failure(name, code, text, purpose, free)


@dataclass
class DeviceBuffer:
    """Memory on the GPU at `pointer`; `free` it when no stream uses it any more."""

    cuda: Cuda
    pointer: int
    size_bytes: int

    def free(self) -> None:
        """Give the memory back; a second call does nothing."""
        pointer, self.pointer = self.pointer, 0
        if pointer:
            self.cuda.release("cudaFree", pointer)


@dataclass
class PinnedBuffer:
    """Page-locked host memory at `pointer`."""

    cuda: Cuda
    pointer: int
    size_bytes: int

    def view(self, dtype: str, shape: tuple[int, ...]) -> Array:
        """The memory as an array; it is valid until `free`, so hand out copies only."""
        raw = (ctypes.c_uint8 * self.size_bytes).from_address(self.pointer)
        return np.frombuffer(memoryview(raw), dtype).reshape(shape)

    def free(self) -> None:
        """Give the memory back; a second call does nothing."""
        pointer, self.pointer = self.pointer, 0
        if pointer:
            self.cuda.release("cudaFreeHost", pointer)


class Stream:
    """A stream that does not wait for the default one (TensorRT synchronises on that)."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        flags = cuda.runtime.cudaStreamNonBlocking
        self._stream = cuda.call("cudaStreamCreateWithFlags", flags)

    @property
    def handle(self) -> int:
        """The `cudaStream_t` as a number, as TensorRT takes it."""
        return int(self._stream)

    def upload(self, target: DeviceBuffer, source: PinnedBuffer) -> None:
        """Enqueue a copy to the GPU."""
        kind = self._cuda.runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._copy(target.pointer, source.pointer, target.size_bytes, kind)

    def download(self, target: PinnedBuffer, source: DeviceBuffer) -> None:
        """Enqueue a copy to the host; `synchronize` before reading it."""
        kind = self._cuda.runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._copy(target.pointer, source.pointer, source.size_bytes, kind)

    def _copy(self, target: int, source: int, size_bytes: int, kind: Any) -> None:
        self._cuda.call("cudaMemcpyAsync", target, source, size_bytes, kind, self._stream)

    def synchronize(self, purpose: str = "") -> None:
        """Wait for everything enqueued; what failed on the GPU is raised here."""
        self._cuda.call("cudaStreamSynchronize", self._stream, purpose=purpose)

    @contextmanager
    def timed(self) -> Iterator[Callable[[], float]]:
        """Mark the work enqueued inside; the callable tells its time in ms after `synchronize`."""
        start, stop = self._cuda.call("cudaEventCreate"), self._cuda.call("cudaEventCreate")

        def elapsed_ms() -> float:
            latency_ms = float(self._cuda.call("cudaEventElapsedTime", start, stop))
            for event in (start, stop):
                self._cuda.call("cudaEventDestroy", event)
            return latency_ms

        self._cuda.call("cudaEventRecord", start, self._stream)
        yield elapsed_ms
        self._cuda.call("cudaEventRecord", stop, self._stream)

    def capture(self, enqueue: Callable[[], object]) -> CapturedGraph:
        """Record what `enqueue` puts on this stream, without running it.

        It must have run once before: a first run may allocate, which a capture forbids. Raises
        `RuntimeFailure` where something in it cannot be captured; the stream is usable then.
        """
        # Only this thread's calls are watched: others may allocate meanwhile.
        mode = self._cuda.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._cuda.call("cudaStreamBeginCapture", self._stream, mode)
        try:
            enqueue()
        except BaseException:
            # An open capture would swallow all later work of the stream. Its status is expected.
            self._cuda.runtime.cudaStreamEndCapture(self._stream)
            self._cuda.runtime.cudaGetLastError()
            raise
        graph = self._cuda.call("cudaStreamEndCapture", self._stream, purpose="CUDA graph")
        try:
            made = self._cuda.call("cudaGraphInstantiateWithFlags", graph, 0, purpose="CUDA graph")
        finally:
            self._cuda.call("cudaGraphDestroy", graph)
        return CapturedGraph(self._cuda, self._stream, made)

    def close(self) -> None:
        """Destroy the stream; a second call does nothing."""
        stream, self._stream = self._stream, None
        if stream is not None:
            self._cuda.release("cudaStreamDestroy", stream)


class CapturedGraph:
    """A recorded sequence of device work on fixed addresses and shapes."""

    def __init__(self, cuda: Cuda, stream: Any, executable: Any) -> None:
        self._cuda, self._stream, self._executable = cuda, stream, executable

    def launch(self) -> None:
        """Enqueue all of it on the stream it was captured from, in one call."""
        self._cuda.call("cudaGraphLaunch", self._executable, self._stream)

    def close(self) -> None:
        """Destroy the graph; a second call does nothing."""
        executable, self._executable = self._executable, None
        if executable is not None:
            self._cuda.release("cudaGraphExecDestroy", executable)


def _import_first(*names: str) -> Any:
    for name in names:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise MissingExtraError(
        f"CUDA is reached through cuda-python, which is not installed (no {' or '.join(names)})",
        "pip install cuda-bindings (12.x for CUDA 12, as on JetPack 6)",
    )


def _decoded(text: Any) -> str:
    return text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)
