"""ONNX Runtime sessions of graphs that exist in memory only, over weights that stay on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiue_export.errors import RuntimeFailure, first_line
from tiue_export.specs import Array, Feeds
from tiue_export.system.onnx_runtime import import_onnx_runtime

_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
_ERRORS_ONLY = 3


class OnnxSession:
    """A changed graph of a bundle, on the CPU; `folder` holds its external data."""

    def __init__(self, model: Any, folder: Path, threads: int | None = None) -> None:
        onnxruntime = import_onnx_runtime()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        # What is measured once does not repay memory that is kept for the next run.
        options.enable_cpu_mem_arena = False
        options.add_session_config_entry(_WEIGHTS_FOLDER, str(folder))
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, ["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's exceptions share no public base class
            raise RuntimeFailure(
                f"ONNX Runtime {onnxruntime.__version__} cannot load {model.graph.name}: "
                f"{first_line(error)}"
            ) from error
        self.outputs = [value.name for value in self._session.get_outputs()]
        self._inputs = {value.name for value in self._session.get_inputs()}

    def run(self, pool: Feeds) -> dict[str, Array]:
        """Outputs by name; inputs are picked out of `pool`."""
        feeds = {name: pool[name] for name in self._inputs}
        return dict(zip(self.outputs, self._session.run(self.outputs, feeds), strict=True))
