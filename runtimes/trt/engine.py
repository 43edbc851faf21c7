"""One TensorRT engine: deserialized from its file, described, given memory, enqueued.

What is used of TensorRT here exists from 10.3 (JetPack 6) to 11.4 and in TensorRT-RTX, or is asked
for first; tests/export/test_trt_contract.py holds this file against the real bindings of each.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiue_export.errors import ResourceError, RuntimeFailure, TiueError, first_line
from tiue_export.system.kept_folder import KeptFolder
from tiue_export.system.tensorrt_flavor import Flavor

from ..buffers import EngineDescription, EngineTensor
from ..cuda_device import FREE_MEMORY

_CHECK_GPU = "Check the GPU and its driver with nvidia-smi and `tiue-export doctor`."
_OF_CUDA = re.compile(r"cuda runtime|cuda driver|cudaerror", re.IGNORECASE)
# The one file of an entry of the cache.
_KERNELS = "kernels.bin"
_OUT_OF_MEMORY = re.compile(r"out of memory|outofmemory|memoryallocation|not be allocated", re.I)


@dataclass(frozen=True)
class Plan:
    """A plan file that was checked: `sha256` is its own, `host_code` the flag to allow it."""

    graph: str
    path: Path
    sha256: str
    version_compatible: bool = False


class EngineLoader:
    """TensorRT's runtime of one flavour, with the logger that both must outlive the engines."""

    def __init__(
        self,
        flavor: Flavor,
        gpu_name: str,
        rebuild: str,
        memory_info: Callable[[], tuple[int, int]],
    ) -> None:
        """`rebuild` is the line that builds the engines again, for errors.

        `memory_info` tells the GPU's (free, total) bytes, for the error when they run out.
        """
        self._flavor, self._gpu_name, self._memory_info = flavor, gpu_name, memory_info
        self.rebuild = f"{rebuild} --rebuild"
        self.errors: list[str] = []
        self._logger = _quiet_logger(flavor.trt, self.errors)
        try:
            self._runtime: Any = flavor.trt.Runtime(self._logger)
        except Exception as error:  # the bindings raise TypeError where CUDA cannot start
            raise RuntimeFailure(
                f"{flavor.title} cannot start{self.reason() or f': {first_line(error)}'}",
                _CHECK_GPU,
            ) from error

    def load(self, plan: Plan) -> LoadedEngine:
        """Deserialize a plan and make its context, which has no memory of its own yet."""
        self.errors.clear()
        # A version-compatible plan carries TensorRT code of its own to run. Its hash is known.
        self._runtime.engine_host_code_allowed = plan.version_compatible
        with (
            plan.path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise self._failure(f"load the plan of {plan.graph}")
        cache = RuntimeCache.of(plan, self._flavor, self._gpu_name)
        context = _make_context(engine, self._flavor, cache)
        if context is None:
            raise self._failure(f"make a context for {plan.graph}")
        description = describe_engine(engine, self._flavor.trt, plan.graph)
        return LoadedEngine(self, engine, context, description, cache)

    def reason(self) -> str:
        """TensorRT's first error since the last load, ready to be appended to a message."""
        return f": {self.errors[0]}" if self.errors else ""

    def _failure(self, what: str) -> TiueError:
        message = f"{self._flavor.title} cannot {what}{self.reason()}"
        if not any(_OUT_OF_MEMORY.search(line) for line in self.errors):
            # Only the first: after any other error without a GPU a CUDA error follows too.
            is_cuda = bool(self.errors) and _OF_CUDA.search(self.errors[0])
            return RuntimeFailure(message, _CHECK_GPU if is_cuda else self.rebuild)
        free, total = self._memory_info()
        known = f"{free / 1e6:,.0f} MB of {total / 1e6:,.0f} MB were free"
        return ResourceError(f"the GPU ran out of memory ({known}): {message}", FREE_MEMORY)


class LoadedEngine:
    """An engine with one execution context. Memory is the caller's; nothing is copied here."""

    def __init__(
        self,
        loader: EngineLoader,
        engine: Any,
        context: Any,
        description: EngineDescription,
        kernels: RuntimeCache | None,
    ) -> None:
        self._loader = loader
        self._engine = engine
        self._context = context
        self._kernels = kernels
        self.description = description

    def set_scratch(self, pointer: int, size_bytes: int) -> None:
        """Lend scratch memory of at least the description's size, 256-byte aligned."""
        if self.description.scratch_bytes:
            self._context.set_device_memory(pointer, size_bytes)

    def bind(self, shapes: Mapping[str, tuple[int, ...]], pointers: Mapping[str, int]) -> None:
        """Fix shape and device address of every tensor; both stay until the next `bind`."""
        context, graph = self._context, self.description.graph
        for tensor in self.description.tensors:
            shape = shapes[tensor.name]
            if tensor.is_input and not context.set_input_shape(tensor.name, shape):
                raise self._refused(f'shape {shape} for "{tensor.name}"')
        unknown = context.infer_shapes()
        if unknown:
            raise RuntimeFailure(
                f"{graph}: no shape is known for {', '.join(unknown)}", self._loader.rebuild
            )
        for tensor in self.description.tensors:
            found = tuple(context.get_tensor_shape(tensor.name))
            if found != shapes[tensor.name]:
                raise RuntimeFailure(
                    f'{graph}: the engine gives "{tensor.name}" the shape {found}; the bundle '
                    f"expects {shapes[tensor.name]}",
                    self._loader.rebuild,
                )
            if not context.set_tensor_address(tensor.name, pointers[tensor.name]):
                raise self._refused(f'the memory for "{tensor.name}"')

    def enqueue(self, stream_handle: int) -> None:
        """Put one run on a stream; it reads and writes the bound memory."""
        self._loader.errors.clear()
        if not self._context.execute_async_v3(stream_handle):
            raise RuntimeFailure(
                f"{self.description.graph}: TensorRT could not start it{self._loader.reason()}",
                _CHECK_GPU,
            )

    def is_capturable(self, stream_handle: int) -> bool:
        """Whether a CUDA graph can hold this engine; only RTX knows before it is tried."""
        context = self._context
        if not hasattr(context, "is_stream_capturable"):
            return True
        return bool(context.is_stream_capturable(stream_handle))

    def save_kernels(self) -> None:
        """Keep on disk what TensorRT-RTX compiled for this GPU so far; others have nothing."""
        if self._kernels is not None:
            self._kernels.save()

    def close(self) -> None:
        """Free the context, then the engine."""
        self.save_kernels()
        self._kernels = self._context = self._engine = None

    def _refused(self, what: str) -> RuntimeFailure:
        reason = self._loader.reason()
        graph = self.description.graph
        return RuntimeFailure(f"{graph}: TensorRT refused {what}{reason}", self._loader.rebuild)


def describe_engine(engine: Any, trt: Any, graph: str) -> EngineDescription:
    """The engine's tensors and its need of scratch memory, as plain data."""
    tensors = []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        shape = tuple(engine.get_tensor_shape(name))
        sizes = None
        # A profile speaks of inputs only.
        if is_input and -1 in shape:
            smallest, _, largest = engine.get_tensor_profile_shape(name, 0)
            sizes = (int(smallest[0]), int(largest[0]))
        dtype = _dtype_name(engine.get_tensor_dtype(name), trt)
        tensors.append(EngineTensor(name, is_input, dtype, shape, sizes))
    return EngineDescription(graph, tuple(tensors), int(engine.device_memory_size_v2))


def _dtype_name(dtype: Any, trt: Any) -> str:
    names = {
        trt.DataType.FLOAT: "float32",
        trt.DataType.HALF: "float16",
        trt.DataType.BF16: "bfloat16",
        trt.DataType.INT32: "int32",
        trt.DataType.INT64: "int64",
    }
    return names.get(dtype, str(dtype))


def _make_context(engine: Any, flavor: Flavor, cache: RuntimeCache | None) -> Any:
    strategy = flavor.trt.ExecutionContextAllocationStrategy.USER_MANAGED
    if not hasattr(engine, "create_runtime_config"):
        return engine.create_execution_context(strategy)
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(strategy)
    if cache is not None:
        cache.attach(config)
    if hasattr(config, "dynamic_shapes_kernel_specialization_strategy"):
        # RTX would otherwise swap kernels in later, behind the back of a captured graph.
        strategies = flavor.trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
    return engine.create_execution_context(config)


class RuntimeCache:
    """Kernels that TensorRT-RTX compiled for this GPU, kept in the user's cache folder.

    Not beside the plan: a bundle holds what its manifest answers for, and may be read-only.
    """

    def __init__(self, kept: KeptFolder) -> None:
        self._kept = kept
        self._cache: Any = None  # TensorRT's own object
        self._stored = b""

    @staticmethod
    def of(plan: Plan, flavor: Flavor, gpu_name: str) -> RuntimeCache | None:
        """The cache of one plan on one GPU, or None where TensorRT has no such thing."""
        if not flavor.has("IRuntimeConfig.create_runtime_cache"):
            return None
        gpu = re.sub(r"\W+", "-", gpu_name).strip("-").lower()
        name = f"{plan.graph}-{plan.sha256[:16]}-{flavor.version}-{gpu}"
        return RuntimeCache(KeptFolder("tensorrt-rtx", name))

    def attach(self, config: Any) -> None:
        """Give the stored kernels to a context's configuration; RTX ignores what does not fit."""
        runtime_cache = config.create_runtime_cache()
        self._stored = self.read()
        if self._stored:
            runtime_cache.deserialize(self._stored)
        config.set_runtime_cache(runtime_cache)
        self._cache = runtime_cache

    def save(self) -> None:
        """Write the kernels to disk if there are new ones."""
        if self._cache is None:
            return
        memory = self._cache.serialize()
        content = b"" if memory is None else bytes(memory)  # none after a CUDA failure
        if content and content != self._stored:
            self.write(content)
            self._stored = content

    def read(self) -> bytes:
        """What is stored; nothing where there is none, or it was damaged."""
        if self._kept.place is None or not self._kept.is_whole:
            return b""
        try:
            return (self._kept.place / _KERNELS).read_bytes()
        except OSError:  # another process needed its room just now
            return b""

    def write(self, content: bytes) -> None:
        """Store for the next start; a folder that cannot be written costs only time then."""
        self._kept.save({_KERNELS: content})


def _quiet_logger(trt: Any, errors: list[str]) -> Any:
    """A TensorRT logger that prints nothing and keeps errors, which go into our own messages."""

    class QuietLogger(trt.ILogger):  # type: ignore[misc]  # a class of an untyped module
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity <= trt.ILogger.ERROR:
                errors.append(" ".join(msg.split()))

    return QuietLogger()
