"""What decides a TensorRT engine, and whether one that lies in a bundle may be run here.

A plan is machine code for one TensorRT version and one kind of GPU. Deserializing a foreign one
ends in an error nobody understands, or in a wrong picture; so a plan is checked against the
manifest first. Light: device runtimes use it.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from tiue_export.bundle.manifest import Compiled, GraphRecord
from tiue_export.bundle.read import Bundle
from tiue_export.errors import BundleError, RuntimeFailure
from tiue_export.system.command_line import command_line
from tiue_export.system.tensorrt_flavor import FOLDERS, TITLES, Device, Flavor

# RTX builds for this set when asked for nothing else: Ampere and whatever came after it.
PORTABLE = "8.0+"
# TensorRT's support matrix (11.4): a version-compatible engine of the first major runs on the
# second; no other combination across major versions is supported.
_ACROSS_MAJORS = {(8, 10), (10, 11)}
_AMPERE = (8, 0)

Flags = Mapping[str, str | bool | int | float]


def graph_identity(
    record: GraphRecord, flavor: str, version: str, target: Mapping[str, str], flags: Flags
) -> str:
    """SHA-256 over all that decides an engine: ONNX files, shapes, flags, TensorRT, target.

    Where workspace and optimization level give way to a lack of memory, the engine keeps the
    identity of what was asked for; its report says what was used.
    """
    content = {
        "onnx": {name: file.sha256 for name, file in record.files.items()},
        "inputs": [asdict(spec) for spec in record.inputs],
        "outputs": [asdict(spec) for spec in record.outputs],
        "precision": record.precision,
        "flavor": flavor,
        "version": version,
        "target": dict(target),
        "flags": dict(flags),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def tensorrt_target(device: Device) -> dict[str, str]:
    """What a plan of the tensorrt flavour is for: this GPU, driver and platform, and no other."""
    return {
        "gpu": device.name,
        "compute_capability": device.compute_capability,
        "driver": device.driver,
        "cuda": device.cuda,
        "platform": this_platform(),
    }


def rtx_target(compute_capabilities: tuple[str, ...]) -> dict[str, str]:
    """What a plan of the rtx flavour is for; none given means Ampere and newer. Any system."""
    return {"compute_capabilities": ",".join(compute_capabilities) or PORTABLE}


def this_platform() -> str:
    """System and machine, such as "linux-aarch64": plans of tensorrt run on one of them only."""
    return f"{platform.system()}-{platform.machine()}".lower()


def compiled_for(bundle: Bundle, flavor: str) -> Compiled:
    """The engines of a flavour in a bundle; `BundleError` with the line to type if it has none."""
    compiled = bundle.manifest.compiled.get(FOLDERS[flavor])
    if compiled is None:
        others = [name for name, folder in FOLDERS.items() if folder in bundle.manifest.compiled]
        have = f"; it has plans of {TITLES[others[0]]}" if others else ""
        raise BundleError(
            f"{bundle.root} has no {TITLES[flavor]} plans{have}", rebuild_line(bundle, flavor)
        )
    return compiled


def check_engine(
    bundle: Bundle, compiled: Compiled, graph: str, flavor: Flavor, device: Device | None
) -> Path:
    """The plan of `graph`, once it is certain to be made for this machine and from this bundle.

    Call it before deserializing. The plan's own SHA-256 was verified by `open_bundle`. Raises
    `RuntimeFailure` where the plan was built for another TensorRT or GPU, `BundleError` where
    there is none or the graph has changed since; both name the command that rebuilds.
    """
    again = rebuild_line(bundle, flavor.name, device)
    if compiled.backend != flavor.name:
        raise RuntimeFailure(
            f"the plans in {bundle.root} were built by {TITLES.get(compiled.backend, '?')} "
            f"{compiled.version}, this is {flavor.title}",
            again,
        )
    entry = compiled.graphs.get(graph)
    if entry is None:
        raise BundleError(f"{bundle.root} has no {flavor.title} plan for {graph}", again)
    record = bundle.manifest.graphs.get(graph)
    if record is None:
        raise BundleError(f"{bundle.root} has a plan for {graph}, but no such graph", again)
    expected = graph_identity(
        record, compiled.backend, compiled.version, compiled.target, compiled.flags
    )
    if entry.identity != expected:
        raise BundleError(
            f"{bundle.root}: the plan of {graph} was built from another {record.path} than the "
            "bundle now holds",
            again,
        )
    _check_version(compiled, flavor, again)
    _check_device(compiled, flavor, device, again)
    return bundle.root / entry.path


def rebuild_line(bundle: Bundle, flavor: str, device: Device | None = None) -> str:
    """The command that builds a bundle's engines for this machine."""
    words: list[object] = ["trt", "--bundle", bundle.root, "--flavor", flavor]
    if flavor == "rtx" and device is not None:
        words += ["--sm", device.compute_capability.replace(".", "")]
    return f"Rebuild with: {command_line(*words)}"


def _check_version(compiled: Compiled, flavor: Flavor, again: str) -> None:
    if compiled.version == flavor.version:
        return
    built, here = _version(compiled.version), _version(flavor.version)
    if compiled.flags.get("version_compatible") is True:
        if (built[0] == here[0] and built <= here) or (built[0], here[0]) in _ACROSS_MAJORS:
            return
        reason = "; version-compatible plans run on newer versions only"
    else:
        reason = ""
    raise RuntimeFailure(
        f"the plans were built for {TITLES[flavor.name]} {compiled.version}, this is "
        f"{flavor.version}{reason}",
        again,
    )


def _check_device(compiled: Compiled, flavor: Flavor, device: Device | None, again: str) -> None:
    if device is None:
        raise RuntimeFailure(
            "no NVIDIA GPU or no driver was found: TensorRT plans cannot run here",
            "Check nvidia-smi, or run the bundle with --runtime ort.",
        )
    here = f"{device.name} (compute capability {device.compute_capability})"
    target = compiled.target
    if flavor.name == "rtx":
        wanted = target.get("compute_capabilities", "")
        if not _rtx_covers(wanted, device.compute_capability, flavor):
            raise RuntimeFailure(
                f"the plans were built for compute capability {wanted}, this is {here}", again
            )
        return
    if target.get("platform") != this_platform():
        raise RuntimeFailure(
            f"the plans were built on {target.get('platform')}, this is {this_platform()}", again
        )
    built = f"{target.get('gpu')} (compute capability {target.get('compute_capability')})"
    if compiled.flags.get("hardware_compatible") is True:
        if _version(device.compute_capability) < _AMPERE:
            raise RuntimeFailure(
                f"the plans were built on {built} for Ampere and newer, this is {here}", again
            )
        return
    if built != here:
        raise RuntimeFailure(f"the plans were built for {built}, this is {here}", again)
    if target.get("driver") != device.driver:
        raise RuntimeFailure(
            f"the plans were built with driver {target.get('driver')}, this is {device.driver}",
            again,
        )


def _rtx_covers(wanted: str, compute_capability: str, flavor: Flavor) -> bool:
    if wanted != PORTABLE:
        return compute_capability in wanted.split(",")
    known = flavor.compute_capabilities
    here = _version(compute_capability)
    newer = bool(known) and here > max(map(_version, known))
    return here >= _AMPERE and (compute_capability in known or newer)


def _version(text: str) -> tuple[int, ...]:
    """ "10.3.0" -> (10, 3, 0); a part that is no number ends it."""
    numbers: list[int] = []
    for part in text.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers) or (0,)
