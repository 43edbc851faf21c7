"""Snapdragon chips and their neural processors (HTP, "Hexagon tensor processor").

A context binary is machine code for one HTP architecture. Model numbers are those of Qualcomm's
SDK (QnnTypes' QnnHtpDevice, and the tables of ExecuTorch's and LiteRT's Qualcomm backends).
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tiue_export.errors import UsageError, unknown_name


@dataclass(frozen=True)
class Soc:
    """One chip: its name on a shelf, HTP architecture and number in Qualcomm's SDK."""

    title: str
    htp: str
    model: int


# By part number, or by what people say. v68 (8 cx, 888) is not here: its HTP has no half precision.
SOCS: Mapping[str, Soc] = {
    "sm8450": Soc("Snapdragon 8 Gen 1", "v69", 36),
    "sm8475": Soc("Snapdragon 8+ Gen 1", "v69", 42),
    "sm8550": Soc("Snapdragon 8 Gen 2", "v73", 43),
    "x-elite": Soc("Snapdragon X Elite, X Plus, X", "v73", 60),
    "sm8650": Soc("Snapdragon 8 Gen 3", "v75", 57),
    "sm8750": Soc("Snapdragon 8 Elite", "v79", 69),
    "sm8850": Soc("Snapdragon 8 Elite Gen 5", "v81", 87),
}
# What an architecture is compiled for where no chip was named.
USUAL_SOC: Mapping[str, str] = {
    "v69": "sm8450",
    "v73": "sm8550",
    "v75": "sm8650",
    "v79": "sm8750",
    "v81": "sm8850",
}
ARCHITECTURES = tuple(USUAL_SOC)
DEFAULT_SOC = "sm8650"
USUAL_HTP = SOCS[DEFAULT_SOC].htp
# Part numbers of laptops; the kernel and Windows name the chip by them.
_LAPTOP = re.compile(r"\bX1[EP][-\w]*|\bSC8380XP\b|\bX1E80100\b|\bX1P\d+\b", re.IGNORECASE)
_PHONE = re.compile(r"\bSM\d{4}", re.IGNORECASE)


def socs_named(socs: Sequence[str], architectures: Sequence[str]) -> tuple[str, ...]:
    """Chips by `--soc` and `--htp`, one for each architecture, in the order given.

    Neither: the usual one. Two chips of one architecture would be one form: the later is refused.
    """
    names = list(socs)
    for name in names:
        if name not in SOCS:
            raise unknown_name("chip", name, SOCS)
    for architecture in architectures:
        version = architecture if architecture.startswith("v") else f"v{architecture}"
        if version not in USUAL_SOC:
            raise unknown_name("HTP architecture", architecture, [a[1:] for a in ARCHITECTURES])
        names.append(USUAL_SOC[version])
    names = list(dict.fromkeys(names)) or [DEFAULT_SOC]
    by_architecture: dict[str, str] = {}
    for name in names:
        other = by_architecture.setdefault(SOCS[name].htp, name)
        if other != name:
            raise UsageError(
                f"{other} and {name} both have HTP {SOCS[name].htp}, which a bundle holds once",
                f"Leave --soc {name} out: the graphs of {other} run there too.",
            )
    return tuple(names)


def may_be_snapdragon() -> bool:
    """Whether it is worth asking: Windows on ARM, or a Linux that describes its chip as phones do.

    Cheap: no process is started for it.
    """
    if platform.machine().lower() not in ("aarch64", "arm64"):
        return False
    return sys.platform == "win32" or Path("/sys/devices/soc0").exists()


def soc_here() -> str | None:
    """The chip of this machine as `SOCS` names it; None where it is no Snapdragon that is known."""
    return soc_in(" ".join(_descriptions())) if may_be_snapdragon() else None


def soc_in(description: str) -> str | None:
    """The chip that a system's own words name, such as "Qualcomm SM8650" or "X1E78100"."""
    phone = _PHONE.search(description)
    if phone is not None and phone[0].lower() in SOCS:
        return phone[0].lower()
    return "x-elite" if _LAPTOP.search(description) else None


def _descriptions() -> list[str]:
    """What the system says of its chip: Windows in its processor's name, Linux and Android here."""
    texts = [platform.processor()]
    for file in ("/sys/devices/soc0/machine", "/sys/firmware/devicetree/base/compatible"):
        try:
            texts.append(Path(file).read_bytes().replace(b"\0", b" ").decode("utf-8", "replace"))
        except OSError:
            continue
    if sys.platform != "win32":
        try:  # Termux on Android
            asked = ["getprop", "ro.soc.model"]
            texts.append(subprocess.run(asked, capture_output=True, text=True, timeout=5).stdout)
        except (OSError, subprocess.SubprocessError):
            pass
    return texts
