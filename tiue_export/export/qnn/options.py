"""What contexts are made for: the chip, its number format, and how much is proven here."""

from __future__ import annotations

from dataclasses import dataclass

from tiue_export.errors import UsageError, unknown_name
from tiue_export.proof.parity import UNET, WHOLE
from tiue_export.proof.quantization_plan import QuantizationPlan
from tiue_export.system.snapdragon import DEFAULT_SOC, SOCS

from .number_formats import NumberFormat, format_named

# Not 1: what it makes of some decoders crashes the emulator (SDK 2.51), and cannot be proven.
OPTIMIZATIONS = (2, 3)
NOTHING = "nothing"
PROOFS = (WHOLE, UNET, NOTHING)


def folder_of(soc: str) -> str:
    """Where the form for a chip lies in a bundle: one for each HTP architecture."""
    return f"qnn-{SOCS[soc].htp}"


@dataclass(frozen=True)
class QnnOptions:
    """For which chip (`SOCS`), in which of `FORMATS`; `optimization` 2 compiles fastest, 3 runs
    fastest.

    What is quantized needs `prompts`, whose drawing its ranges are measured on; layers that `plan`
    keeps in float stay in half. `prove` is one of `PROOFS`.
    """

    soc: str = DEFAULT_SOC
    optimization: int = 3
    precision: str = "fp16"
    prompts: tuple[str, ...] = ()
    plan: QuantizationPlan | None = None
    prove: str = WHOLE

    def __post_init__(self) -> None:
        if self.optimization not in OPTIMIZATIONS:
            raise UsageError(
                f"--optimization is {self.optimization}; expected 2 or 3",
                "Leave it out for 3, the longest search.",
            )
        if self.prove not in PROOFS:
            raise unknown_name("proof", self.prove, PROOFS)
        if self.format.quantized and not self.prompts:
            raise UsageError(
                f"{self.precision} measures ranges on prompts, and got none",
                "Add --calibration-prompts FILE, a text file with one prompt a line.",
            )
        if not self.format.quantized and (self.prompts or self.plan):
            option = "--calibration-prompts" if self.prompts else "--plan"
            raise UsageError(
                f"{option} is for --precision w8a16 and w8a8; here it is {self.precision}",
                "Leave it out, or add --precision w8a16.",
            )

    @property
    def format(self) -> NumberFormat:
        """Of its name; raises `UsageError` for another."""
        return format_named(self.precision)
