"""ONNX Runtime: CPU by default, CUDA where the installed onnxruntime-gpu finds it, RTX if asked.

On a GPU whole drawings keep their tensors there (chain.py); graph by graph, as the parity check
runs them, tensors go through the host. With a CUDA graph both use the fixed memory it needs.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from tiue_export.bundle.chain import NOISE, TOKENS
from tiue_export.bundle.read import Bundle
from tiue_export.errors import (
    RuntimeFailure,
    TiueWarning,
    UsageError,
    first_line,
    unknown_name,
)
from tiue_export.specs import GRAPH_NAMES, Array, ChainResult, Feeds, RuntimeOptions
from tiue_export.system.install import install_line
from tiue_export.system.kept_folder import KeptFolder
from tiue_export.system.onnx_runtime import import_onnx_runtime

from ..buffers import checked_chain_feeds, checked_feeds
from .chain import OrtChain
from .rtx import PROVIDER, rtx_devices

ort = import_onnx_runtime()

_DEVICES = ("cpu", "cuda")
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "rtx": PROVIDER}
_ERRORS_ONLY = 3


class OrtRuntime:
    """One session per graph, opened on first use and kept."""

    name = "ort"

    def __init__(self, bundle: Bundle, device: str, options: RuntimeOptions) -> None:
        """`device` is a provider: cpu, cuda or rtx."""
        self.device = device
        self.precision = bundle.manifest.precision
        self._bundle = bundle
        self._options = options
        self._sessions: dict[str, Any] = {}
        self._kept: list[KeptFolder] = []
        self._chain: OrtChain | None = None
        self._chains = True
        self._closed = False

    def run(self, graph: str, feeds: Feeds) -> dict[str, Array]:
        """Run one graph; outputs are fresh arrays."""
        session = self._session(graph)
        if self._options.cuda_graph and self.device != "cpu":
            _, batch = checked_feeds(self._bundle.spec(graph), feeds)
            return self._chain_for(batch).run_graph(graph, feeds)
        names = [spec.name for spec in self._bundle.spec(graph).outputs]
        try:
            outputs = session.run(names, {k: np.ascontiguousarray(v) for k, v in feeds.items()})
        except Exception as error:  # onnxruntime's exceptions share no public base class
            raise RuntimeFailure(f"ONNX Runtime failed in {graph}: {first_line(error)}") from error
        return dict(zip(names, outputs, strict=True))

    def run_chain(self, input_ids: Array, noise: Array) -> ChainResult | None:
        """All graphs with their tensors kept on the GPU; None on the CPU, where that saves nothing.

        Raises `RuntimeFailure` naming the first graph with a non-finite output.
        """
        if self.device == "cpu" or not self._chains:
            return None
        for graph in GRAPH_NAMES:
            self._session(graph)
        if self.device == "cpu":  # CUDA was only hoped for, and did not start
            return None
        specs = [self._bundle.spec(graph) for graph in GRAPH_NAMES]
        feeds, batch = checked_chain_feeds(specs, {TOKENS: input_ids, NOISE: noise})
        try:
            chain = self._chain_for(batch)
        except RuntimeFailure as failure:
            if self._options.cuda_graph:
                raise
            self._chains = False
            warnings.warn(
                f"tensors go through the host, as {first_line(failure)}", TiueWarning, stacklevel=2
            )
            return None
        return chain.run_chain(feeds)

    def _chain_for(self, batch: int) -> OrtChain:
        if self._chain is None or self._chain.batch != batch:
            if self._chain is not None and self._options.cuda_graph:
                self._sessions.clear()  # they replay what they captured, at the old batch
            self._chain = OrtChain(self._bundle, batch, "cuda", self._session)
        return self._chain

    def _session(self, graph: str) -> Any:
        if self._closed:
            raise RuntimeFailure("the ort runtime is closed", "Open it again.")
        if graph not in self._sessions:
            self._sessions[graph] = self._open(graph)
        return self._sessions[graph]

    def close(self) -> None:
        """Drop all sessions and their memory."""
        self._chain = None
        self._sessions.clear()
        for kept in self._kept:  # written as the sessions end
            kept.save()
        self._kept.clear()
        self._closed = True

    def _open(self, graph: str) -> Any:
        if self._bundle.manifest.graphs[graph].precision == "bf16":
            raise RuntimeFailure(
                f"{graph} is in bf16, which ONNX Runtime does not compute in",
                "Run the bundle with TensorRT, or export with --vae-precision fp16 or fp32.",
            )
        options = ort.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        if self._options.threads is not None:
            options.intra_op_num_threads = self._options.threads
        # The arena keeps what it once allocated: measured at SD 2.1-base size, 10.4 GB against
        # 6.3 GB for the fp16 decoder, and 10.7 s against 15.9 s from the second run on.
        options.enable_cpu_mem_arena = not self._options.low_memory
        path, settings = self._bundle.graph_path(graph), self._provider_settings(graph)
        providers: list[Any] | None = [_PROVIDERS["cpu"]]
        if self.device == "cuda":
            providers = [(_PROVIDERS["cuda"], settings), _PROVIDERS["cpu"]]
        try:
            if self.device == "rtx":
                providers = None  # a plug-in is named by its devices instead
                options.add_provider_for_devices(rtx_devices(), settings)
            session = ort.InferenceSession(path, options, providers)
        except Exception as error:
            raise RuntimeFailure(
                f"ONNX Runtime {ort.__version__} cannot load {graph}: {first_line(error)}",
                "Check `tiue-export doctor`; bundles need ONNX Runtime 1.18 or newer.",
            ) from error
        # A provider that fails to start is dropped by ONNX Runtime with a log line only.
        if session.get_providers()[0] != _PROVIDERS[self.device]:
            if self._options.device == "auto" and self._options.provider is None:
                warnings.warn(
                    f"onnxruntime could not start {_PROVIDERS[self.device]}: running on the CPU",
                    TiueWarning,
                    stacklevel=2,
                )
                self.device = "cpu"
                return session
            raise RuntimeFailure(
                f"ONNX Runtime could not start {_PROVIDERS[self.device]}; it offers "
                f"{', '.join(session.get_providers())}",
                "Check the CUDA and cuDNN versions with `tiue-export doctor`, or use "
                f"{'--device' if self._options.provider is None else '--provider'} cpu.",
            )
        return session

    def _provider_settings(self, graph: str) -> dict[str, str]:
        settings = {}
        if self.device == "cuda" and self._bundle.manifest.precision == "fp32":
            settings["use_tf32"] = "0"  # TF32 would round an fp32 bundle's products to 10 bits
        if self.device == "rtx":
            files = self._bundle.manifest.graphs[graph].files.values()
            content = hashlib.sha256("".join(record.sha256 for record in files).encode())
            name = f"{graph}-{content.hexdigest()[:16]}-{ort.__version__}"
            kept = KeptFolder("onnxruntime-rtx", name)
            if kept.place is not None:
                settings["nv_runtime_cache_path"] = str(kept.place)
                self._kept.append(kept)
        if self._options.cuda_graph:
            settings["enable_cuda_graph"] = "1"
        return settings


def open_runtime(bundle: Bundle, options: RuntimeOptions) -> OrtRuntime:
    """Open on `options.device`: cpu, cuda, or auto (cuda if this onnxruntime was built for it).

    `options.provider` says it more exactly: rtx is TensorRT-RTX as a plug-in.
    """
    if options.threads is not None and options.threads < 1:
        raise UsageError(f"--threads is {options.threads}; expected 1 or more")
    available = ort.get_available_providers()
    provider = choose_provider(options, available)
    if options.cuda_graph and provider == "cpu":
        raise UsageError(
            "--cuda-graph needs an NVIDIA GPU; this runs on the CPU",
            "Leave it out, or add --provider cuda or rtx.",
        )
    if provider == "rtx":
        rtx_devices()
    elif _PROVIDERS[provider] not in available:
        raise RuntimeFailure(
            f"this onnxruntime ({ort.__version__}) has no {_PROVIDERS[provider]}; it has "
            f"{', '.join(available)}",
            f"pip uninstall onnxruntime && {install_line('gpu')}",
        )
    return OrtRuntime(bundle, provider, options)


def choose_provider(options: RuntimeOptions, available: Sequence[str]) -> str:
    """cpu, cuda or rtx, from what was asked for and, for "auto", ONNX Runtime's own providers."""
    device, provider = options.device, options.provider
    if device not in (*_DEVICES, "auto"):
        raise unknown_name("device", device, _DEVICES)
    if provider is None:
        found = "cuda" if _PROVIDERS["cuda"] in available else "cpu"
        return found if device == "auto" else device
    if provider not in _PROVIDERS:
        raise unknown_name("provider", provider, _PROVIDERS)
    if device != "auto" and (device == "cpu") != (provider == "cpu"):
        raise UsageError(
            f"--device {device} and --provider {provider} contradict each other",
            "Leave --device out.",
        )
    return provider
