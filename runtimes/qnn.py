"""Snapdragon's neural processor (HTP), and Qualcomm's emulator of it on other machines.

The emulator computes what the processor would, in its number formats, on one core: it proves
numbers and says nothing of speed.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from tiue_export.bundle.manifest import Compiled
from tiue_export.bundle.read import Bundle
from tiue_export.errors import (
    BundleError,
    RuntimeFailure,
    TiueWarning,
    first_line,
    unknown_name,
)
from tiue_export.specs import UNET_DECODER, Array, Feeds, RuntimeOptions
from tiue_export.system.command_line import command_line
from tiue_export.system.qnn_provider import has_npu, qnn_session, qnn_versions
from tiue_export.system.snapdragon import ARCHITECTURES, SOCS, USUAL_HTP, soc_here

from .qnn_emulator import Emulator

_PREFIX = "qnn-"


class QnnRuntime:
    """Contexts of all graphs on the NPU, each opened on first use and kept; or in the emulator."""

    name = "qnn"

    def __init__(self, bundle: Bundle, form: Compiled, *, emulated: bool, keep: bool) -> None:
        self.device = f"{'emulator' if emulated else 'npu'} {form.target['htp']}"
        self.precision = f"htp-{form.flags['precision']}"
        self._bundle, self._form, self._keep = bundle, form, keep
        self._emulator = Emulator() if emulated else None
        self._sessions: dict[str, Any] = {}
        self._closed = False

    def run(self, graph: str, feeds: Feeds) -> dict[str, Array]:
        """Run one graph; outputs are fresh arrays."""
        if self._closed:
            raise RuntimeFailure("the qnn runtime is closed", "Open it again.")
        timesteps, limit = feeds.get("timesteps"), self.step_limit()
        if graph == UNET_DECODER and timesteps is not None and limit is not None:
            steps = len(timesteps)
            if steps < limit:  # its context has one size: the last one again, and cut off
                more = np.full(limit - steps, timesteps[-1], timesteps.dtype)
                longer = {**feeds, "timesteps": np.concatenate([timesteps, more])}
                outputs = self._run(graph, longer)
                return {k: v[: len(v) // limit * steps].copy() for k, v in outputs.items()}
        return self._run(graph, feeds)

    def _run(self, graph: str, feeds: Feeds) -> dict[str, Array]:
        names = [spec.name for spec in self._bundle.spec(graph).outputs]
        if self._emulator is not None:
            context = self._bundle.root / self._form.graphs[graph].path
            outputs = self._emulator.run(graph, context, feeds)
            if not self._keep:
                self._emulator.close()
            return {name: outputs[name] for name in names}
        session = self._session(graph)
        try:
            values = session.run(names, {k: np.ascontiguousarray(v) for k, v in feeds.items()})
        except Exception as error:  # onnxruntime's exceptions share no public base class
            raise RuntimeFailure(f"the HTP failed in {graph}: {first_line(error)}") from error
        if not self._keep:
            self._sessions.clear()
        return dict(zip(names, values, strict=True))

    def step_limit(self) -> int | None:
        """As many as the decoder's context was compiled for."""
        if self._bundle.manifest.plan.one_pass:
            return None
        return int(self._form.flags["decoder_steps"])

    def close(self) -> None:
        """Drop all contexts and their memory."""
        if self._emulator is not None:
            self._emulator.close()
        self._sessions.clear()
        self._closed = True

    def _session(self, graph: str) -> Any:
        if graph not in self._sessions:
            path = self._bundle.root / self._form.graphs[graph].path
            try:
                # Burst: the clock of a picture's second, not of a video's hour.
                self._sessions[graph] = qnn_session(path, {"htp_performance_mode": "burst"})
            except Exception as error:  # onnxruntime's exceptions share no public base class
                raise RuntimeFailure(
                    f"the context of {graph} cannot be opened: {first_line(error)}",
                    _again(self._bundle, self._form),
                ) from error
        return self._sessions[graph]


def open_runtime(bundle: Bundle, options: RuntimeOptions) -> QnnRuntime:
    """Open on `options.device`: auto, npu, emulator, or an HTP architecture such as v75.

    auto takes the processor where there is one, and the form that is for it; on the emulator the
    first form, and says so. Raises `BundleError` where the bundle has no such form,
    `RuntimeFailure` where a form is for another chip or a newer SDK, or there is no processor.
    """
    forms = {
        compiled.target["htp"]: compiled
        for folder, compiled in bundle.manifest.compiled.items()
        if folder.startswith(_PREFIX)
    }
    wanted = options.device.lower()
    if wanted not in ("auto", "npu", "emulator", *ARCHITECTURES):
        raise unknown_name("device", options.device, ("auto", "npu", "emulator", *ARCHITECTURES))
    npu = has_npu()
    if wanted == "npu" and not npu:
        raise RuntimeFailure(
            "no Snapdragon NPU is here, or its driver is not found",
            "Use --device emulator, which is exact and slow.",
        )
    emulated = wanted == "emulator" or not npu
    here = None if emulated else soc_here()
    htp = wanted if wanted in ARCHITECTURES else (SOCS[here].htp if here else None)
    if htp is None and not emulated and len(forms) > 1:
        raise RuntimeFailure(
            f"this chip does not say its name, and {bundle.root} has contexts for "
            f"{', '.join(forms)}",
            f"Name its architecture (docs/snapdragon.md), such as --device {next(iter(forms))}.",
        )
    form = _form_for(bundle, forms, htp)
    _check_whole(bundle, form)
    if here and SOCS[here].htp != form.target["htp"]:
        raise RuntimeFailure(
            f"the contexts are for {form.target['htp']}, this is {SOCS[here].title} "
            f"({SOCS[here].htp})",
            "Make them for it: " + command_line("qnn", "--bundle", bundle.root, "--soc", here),
        )
    if _numbers(form.version) > _numbers(qnn_versions()[1]):
        raise RuntimeFailure(
            f"the contexts were compiled by Qualcomm's SDK {form.version}, here is the older "
            f"{qnn_versions()[1]}",
            "Install the package they were made with, or compile them again: "
            + command_line("qnn", "--bundle", bundle.root, "--htp", form.target["htp"][1:]),
        )
    if emulated and wanted == "auto":
        warnings.warn(
            f"no Snapdragon NPU is here: Qualcomm's emulator of HTP {form.target['htp']} computes "
            "the same numbers, many times slower",
            TiueWarning,
            stacklevel=2,
        )
    return QnnRuntime(bundle, form, emulated=emulated, keep=not options.low_memory)


def _form_for(bundle: Bundle, forms: dict[str, Compiled], htp: str | None) -> Compiled:
    if htp is None and forms:
        return next(iter(forms.values()))
    if htp in forms:
        return forms[htp]
    has = f"; it has those of {', '.join(forms)}" if forms else ""
    for_what = f"HTP {htp}" if htp else "Snapdragon"
    number = htp[1:] if htp else USUAL_HTP[1:]
    raise BundleError(
        f"{bundle.root} has no contexts for {for_what}{has}",
        "Make them: " + command_line("qnn", "--bundle", bundle.root, "--htp", number),
    )


def _check_whole(bundle: Bundle, form: Compiled) -> None:
    """Refuse what a compilation that failed half way left behind."""
    lacking = [name for name in bundle.manifest.graphs if name not in form.graphs]
    if lacking:
        words = ("qnn", "--bundle", bundle.root, "--htp", form.target["htp"][1:])
        precision = ("--precision", str(form.flags["precision"]))
        raise BundleError(
            f"the contexts for HTP {form.target['htp']} are unfinished: {bundle.root} has none of "
            f"{', '.join(lacking)}",
            "Make the rest: " + command_line(*words, *precision),
        )


def _again(bundle: Bundle, form: Compiled) -> str:
    words = ("qnn", "--bundle", bundle.root, "--soc", form.target["soc"], "--force")
    return "Compile it again: " + command_line(*words)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
