"""TensorRT and TensorRT-RTX: engines of a bundle on one GPU, without torch.

All four graphs run on one stream; the encoder writes where the decoder reads, the engines lend each
other one scratch memory, and after a warm-up a whole drawing (copies from and to pinned memory
included) is one CUDA graph launch. Python 3.10 and numpy suffice beside TensorRT and cuda-python,
so that JetPack 6 (TensorRT 10.3) runs it. A runtime belongs to one thread.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from tiue_export.bundle.chain import LATENTS, NOISE, PICTURE, SCALED_LATENTS, TOKENS
from tiue_export.bundle.engine_identity import check_engine, compiled_for, rebuild_line
from tiue_export.bundle.manifest import Compiled
from tiue_export.bundle.read import Bundle
from tiue_export.errors import RuntimeFailure, TiueError, TiueWarning, UsageError, first_line
from tiue_export.specs import (
    GRAPH_NAMES,
    VAE_DECODER,
    Array,
    ChainResult,
    Feeds,
    RuntimeOptions,
    check_finite,
)
from tiue_export.system.tensorrt_flavor import (
    FOLDERS,
    Device,
    Flavor,
    installed_flavors,
    load_flavor,
    this_device,
)

from ..buffers import (
    ChainMemory,
    check_engine_fits,
    check_size,
    checked_chain_feeds,
    checked_feeds,
    open_inputs,
    plan_memory,
    scratch_size_bytes,
)
from ..cuda_device import Cuda, DeviceBuffer, PinnedBuffer, Stream
from .divide import Divide
from .engine import EngineLoader, LoadedEngine, Plan

# TensorRT may allocate in a first run, and RTX compiles kernels in it.
_WARM_UP_RUNS = 2
ONE_GRAPH_STAGE = "one CUDA graph"
Timers = dict[str, Callable[[], float]]


class TrtRuntime:
    """Engines loaded on first use and kept, or with `low_memory` loaded for each run and freed."""

    name = "trt"

    def __init__(
        self,
        bundle: Bundle,
        engines: Engines,
        loader: EngineLoader,
        cuda: Cuda,
        device: str,
        options: RuntimeOptions,
    ) -> None:
        self.device = device
        self.precision = bundle.manifest.precision
        self._bundle, self._loader = bundle, loader
        self._plans, self._batches = engines.plans, engines.batch_range
        self._steps = engines.step_limit
        self._cuda, self._options = cuda, options
        self._stream = Stream(cuda)
        self._in_loop = not bundle.manifest.plan.one_pass
        self._specs = [bundle.spec(name) for name in bundle.manifest.graphs]
        self._engines: dict[str, LoadedEngine] = {}
        self._bound: set[str] = set()  # graphs whose engine knows the addresses of `_memory`
        self._memory: DeviceMemory | None = None
        self._scratch: DeviceBuffer | None = None
        self._divide: Divide | None = None
        self._chain: Callable[[], Timers] | None = None
        self._free_chain: Callable[[], None] = _nothing
        whole = not self._in_loop and set(GRAPH_NAMES) <= engines.plans.keys()
        self._chains = whole and not options.low_memory
        self._closed = False

    def batch_range(self) -> tuple[int, int]:
        """The smallest and largest batch that the engines were built for."""
        return self._batches

    def step_limit(self) -> int | None:
        """How many steps of a loop the decoder's engine takes at once; None: it has no loop."""
        return self._steps

    def run(self, graph: str, feeds: Feeds) -> dict[str, Array]:
        """Run one graph; outputs are fresh arrays."""
        spec = self._bundle.spec(graph)
        chosen, size = checked_feeds(spec, feeds)
        engine = self._engine(graph)
        memory = self._memory_for(size if open_inputs(spec) else None)
        self._bind(engine, memory)
        places = memory.plan.places[graph]
        for name, array in chosen.items():
            memory.write(places[name], array)
            memory.upload(places[name])
        engine.enqueue(self._stream.handle)
        outputs = self._read_outputs(graph, memory)
        if self._options.low_memory:
            self._release()
        return outputs

    def run_chain(self, input_ids: Array, noise: Array) -> ChainResult | None:
        """All four graphs in one go, or None where they must run one by one.

        Raises `RuntimeFailure` naming the graph whose output is the first with a non-finite value.
        """
        self._check_open()
        if not self._chains:
            return None
        feeds, batch = checked_chain_feeds(self._specs, {TOKENS: input_ids, NOISE: noise})
        memory = self._memory_for(batch)
        for value, array in feeds.items():
            memory.write(value, array)
        if self._chain is None and not self._open_chain(memory):
            return None
        assert self._chain is not None
        timers = self._chain()
        self._stream.synchronize("drawing")
        latents, picture = memory.read(LATENTS), memory.read(PICTURE)
        if not (np.isfinite(latents).all() and np.isfinite(picture).all()):
            for graph in GRAPH_NAMES:
                check_finite(graph, self._read_outputs(graph, memory))
        stages = {name: elapsed_ms() for name, elapsed_ms in timers.items()}
        return ChainResult(latents, picture, stages)

    def close(self) -> None:
        """Free engines and memory; what RTX compiled is kept on disk. Twice does nothing more."""
        if self._closed:
            return
        self._release()
        if self._divide is not None:
            self._divide.close()
        self._stream.close()
        self._closed = True

    def _engine(self, graph: str) -> LoadedEngine:
        self._check_open()
        if graph not in self._engines:
            if graph not in self._plans:
                raise RuntimeFailure(f"{self._bundle.root} has no plan for {graph}")
            engine = self._loader.load(self._plans[graph])
            check_engine_fits(engine.description, self._bundle.spec(graph), self._loader.rebuild)
            self._engines[graph] = engine
            self._lend_scratch()
        return self._engines[graph]

    def _lend_scratch(self) -> None:
        """Give every engine the same scratch memory: they run one after the other."""
        needs = [engine.description.scratch_bytes for engine in self._engines.values()]
        size_bytes = scratch_size_bytes(needs)
        if self._scratch is None or self._scratch.size_bytes < size_bytes:
            self._drop_chain()
            if self._scratch is not None:
                self._scratch.free()
            neediest = max(self._engines, key=lambda g: self._engines[g].description.scratch_bytes)
            self._scratch = self._cuda.allocate(size_bytes, f"{neediest}: scratch memory")
        for engine in self._engines.values():
            engine.set_scratch(self._scratch.pointer, self._scratch.size_bytes)

    def _memory_for(self, size: int | None) -> DeviceMemory:
        """The buffers for open axes of this size, or of whatever size where no axis is open.

        Those of another size are freed first, which in a loop are timesteps and outputs alone: the
        features stay where they are while the decoder takes groups of other lengths.
        """
        if self._memory is None:
            plan = self._planned(self._batches[0] if size is None else size)
            self._memory = DeviceMemory(self._cuda, self._stream, plan)
        elif size not in (None, self._memory.plan.size):
            assert size is not None
            self._drop_chain()
            moved = self._memory.replan(self._planned(size))
            places = self._memory.plan.places
            self._bound = {
                graph for graph in self._bound if not moved & set(places[graph].values())
            }
        return self._memory

    def _planned(self, size: int) -> ChainMemory:
        return plan_memory(self._specs, size, in_loop=self._in_loop)

    def _bind(self, engine: LoadedEngine, memory: DeviceMemory) -> None:
        graph = engine.description.graph
        if graph in self._bound:
            return
        spec = self._bundle.spec(graph)
        check_size(engine.description, spec, memory.plan.size, self._loader.rebuild)
        places = memory.plan.places[graph]
        engine.bind(
            {name: memory.plan.tensors[value].shape for name, value in places.items()},
            {name: memory.buffer(value).pointer for name, value in places.items()},
        )
        self._bound.add(graph)

    def _read_outputs(self, graph: str, memory: DeviceMemory) -> dict[str, Array]:
        places = memory.plan.places[graph]
        names = [tensor.name for tensor in self._bundle.spec(graph).outputs]
        for name in names:
            memory.download(places[name])
        self._stream.synchronize(graph)
        return {name: memory.read(places[name]) for name in names}

    def _open_chain(self, memory: DeviceMemory) -> bool:
        """Load all engines, run them once, and record that run; False if they cannot be chained."""
        engines = [self._engine(graph) for graph in GRAPH_NAMES]
        for engine in engines:
            self._bind(engine, memory)
        if self._divide is None:
            try:
                self._divide = Divide(self._cuda)
            except RuntimeFailure as failure:
                self._chains = False
                _warn(f"the graphs run one by one, as {first_line(failure)}")
                return False
        for _ in range(_WARM_UP_RUNS):
            self._enqueue_chain(memory, timed=False)
            self._stream.synchronize("warm-up")
        for engine in engines:
            engine.save_kernels()
        if self._options.cuda_graph is False or not self._capture(engines, memory):
            self._chain = lambda: self._enqueue_chain(memory, timed=True)
        return True

    def _capture(self, engines: list[LoadedEngine], memory: DeviceMemory) -> bool:
        """Make the chain one CUDA graph; where that fails unasked, say why and return False."""
        stream = self._stream
        blocked = [e.description.graph for e in engines if not e.is_capturable(stream.handle)]
        try:
            if blocked:
                raise RuntimeFailure(f"TensorRT-RTX says {', '.join(blocked)} cannot be captured")
            graph = stream.capture(lambda: self._enqueue_chain(memory, timed=False))
        except RuntimeFailure as failure:
            message = f"the drawing cannot be captured in a CUDA graph: {first_line(failure)}"
            if self._options.cuda_graph:
                raise RuntimeFailure(message, "Run it with --no-cuda-graph.") from failure
            _warn(f"{message}. It runs without one, a little slower.")
            return False

        def launch() -> Timers:
            with stream.timed() as elapsed_ms:
                graph.launch()
            return {ONE_GRAPH_STAGE: elapsed_ms}

        self._chain, self._free_chain = launch, graph.close
        return True

    def _enqueue_chain(self, memory: DeviceMemory, *, timed: bool) -> Timers:
        """Put one drawing on the stream, from pinned memory to pinned memory."""
        timers: Timers = {}
        memory.upload(TOKENS)
        memory.upload(NOISE)
        for graph in GRAPH_NAMES:
            if timed:
                with self._stream.timed() as timers[graph]:
                    self._enqueue_graph(graph, memory)
            else:
                self._enqueue_graph(graph, memory)
        memory.download(LATENTS)
        memory.download(PICTURE)
        return timers

    def _enqueue_graph(self, graph: str, memory: DeviceMemory) -> None:
        if graph == VAE_DECODER:
            assert self._divide is not None
            factor = self._bundle.manifest.vae_scaling_factor
            scaled, latents = memory.buffer(SCALED_LATENTS), memory.buffer(LATENTS)
            self._divide.enqueue(self._stream, scaled, latents, factor)
        self._engines[graph].enqueue(self._stream.handle)

    def _drop_chain(self) -> None:
        free, self._free_chain, self._chain = self._free_chain, _nothing, None
        free()

    def _drop_memory(self) -> None:
        self._drop_chain()
        self._bound.clear()
        if self._memory is not None:
            self._memory.free()
        self._memory = None

    def _release(self) -> None:
        """Free everything but the stream."""
        self._drop_memory()
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()
        if self._scratch is not None:
            self._scratch.free()
        self._scratch = None

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeFailure("the trt runtime is closed", "Open it again.")


class DeviceMemory:
    """The buffers of one plan, on the GPU and pinned, each allocated on first use."""

    def __init__(self, cuda: Cuda, stream: Stream, plan: ChainMemory) -> None:
        self.plan = plan
        self._cuda, self._stream = cuda, stream
        self._buffers: dict[str, DeviceBuffer] = {}
        self._pinned: dict[str, PinnedBuffer] = {}

    def buffer(self, value: str) -> DeviceBuffer:
        """The GPU memory of a value; its address stays until `free`."""
        if value not in self._buffers:
            size_bytes = self.plan.tensors[value].size_bytes
            purpose = f"{self.plan.graph_of(value)}: {value}"
            self._buffers[value] = self._cuda.allocate(size_bytes, purpose)
        return self._buffers[value]

    def write(self, value: str, array: Array) -> None:
        """Put an array where `upload` takes it from."""
        self._view(value)[...] = array

    def read(self, value: str) -> Array:
        """What `download` brought, as a fresh array; synchronize the stream first."""
        return self._view(value).copy()

    def upload(self, value: str) -> None:
        """Enqueue the copy to the GPU."""
        self._stream.upload(self.buffer(value), self._host(value))

    def download(self, value: str) -> None:
        """Enqueue the copy to the host."""
        self._stream.download(self._host(value), self.buffer(value))

    def replan(self, plan: ChainMemory) -> set[str]:
        """Hold another plan of the same graphs; returns the values whose memory was freed for it.

        Those that are alike in both keep their memory, its content and its address.
        """
        kept = self.plan.tensors
        moved = {value for value, tensor in plan.tensors.items() if kept.get(value) != tensor}
        self._free(moved)
        self.plan = plan
        return moved

    def free(self) -> None:
        """Free everything; CUDA itself waits for work that uses it."""
        self._free(self._buffers.keys() | self._pinned.keys())

    def _free(self, values: set[str]) -> None:
        for value in values:
            for held in (self._buffers.pop(value, None), self._pinned.pop(value, None)):
                if held is not None:
                    held.free()

    def _host(self, value: str) -> PinnedBuffer:
        if value not in self._pinned:
            size_bytes = self.plan.tensors[value].size_bytes
            purpose = f"{self.plan.graph_of(value)}: {value}"
            self._pinned[value] = self._cuda.allocate_pinned(size_bytes, purpose)
        return self._pinned[value]

    def _view(self, value: str) -> Array:
        tensor = self.plan.tensors[value]
        return self._host(value).view(tensor.dtype, tensor.shape)


def open_runtime(bundle: Bundle, options: RuntimeOptions) -> TrtRuntime:
    """Open the bundle's engines for this GPU; each is checked before anything is deserialized.

    Raises `RuntimeFailure` for no GPU or engines made for another machine, `BundleError` for a
    bundle without engines, `MissingExtraError` for a missing TensorRT or cuda-python.
    """
    if options.device not in ("auto", "cuda"):
        raise UsageError(
            f"--device is {options.device}; TensorRT engines run on an NVIDIA GPU only",
            "Leave it out, or use --runtime ort.",
        )
    gpu = this_device()
    if gpu is None:
        raise RuntimeFailure(
            "no NVIDIA GPU or no driver was found: TensorRT engines cannot run here",
            "Check nvidia-smi, or run the bundle with --runtime ort.",
        )
    engines = choose_engines(bundle, gpu)
    flavor, cuda = engines.flavor, Cuda()
    rebuild = rebuild_line(bundle, flavor.name, gpu)
    loader = EngineLoader(flavor, gpu.name, rebuild, cuda.memory_info)
    device = f"cuda ({gpu.name}, {flavor.title})"
    return TrtRuntime(bundle, engines, loader, cuda, device, options)


@dataclass(frozen=True)
class Engines:
    """Plans of one flavour, each certain to fit this bundle, TensorRT and GPU.

    `step_limit` is the most steps of a loop that the decoder takes at once, None without a loop.
    """

    flavor: Flavor
    plans: Mapping[str, Plan]
    batch_range: tuple[int, int]
    step_limit: int | None = None


def choose_engines(bundle: Bundle, gpu: Device) -> Engines:
    """The flavour whose engines the bundle holds, this machine has and this GPU runs.

    `tensorrt` goes before `rtx` where both would do. Raises what keeps the first from running.
    """
    held = [name for name, folder in FOLDERS.items() if folder in bundle.manifest.compiled]
    installed = installed_flavors()
    if not held:
        compiled_for(bundle, installed[0] if installed else "tensorrt")
    failures = []
    for name in [name for name in held if name in installed] or held[:1]:
        try:
            flavor = load_flavor(name)
            return checked_engines(bundle, compiled_for(bundle, name), flavor, gpu)
        except TiueError as failure:
            failures.append(failure)
    raise failures[0]


def checked_engines(bundle: Bundle, compiled: Compiled, flavor: Flavor, gpu: Device) -> Engines:
    """The plan file of every graph, each checked against its identity."""
    portable = compiled.flags.get("version_compatible") is True
    plans = {}
    for graph, entry in compiled.graphs.items():
        path = check_engine(bundle, compiled, graph, flavor, gpu)
        plans[graph] = Plan(graph, path, entry.files[entry.path].sha256, portable)
    batches = [int(size) for size in str(compiled.flags.get("batch", "1")).split(":")]
    steps = compiled.flags.get("decoder_steps")
    limit = None if steps is None else int(str(steps).rpartition(":")[2])
    return Engines(flavor, plans, (batches[0], batches[-1]), limit)


def _warn(message: str) -> None:
    warnings.warn(message, TiueWarning, stacklevel=3)


def _nothing() -> None:
    """What freeing no graph does."""
