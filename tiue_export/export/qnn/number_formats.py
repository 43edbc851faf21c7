"""The number formats of an HTP, and which operations compute in each."""

from __future__ import annotations

from dataclasses import dataclass

from tiue_export.errors import unknown_name


@dataclass(frozen=True)
class NumberFormat:
    """Weights of 8 bits where `activation_bits` is not None, else everything in half precision.

    `whole`: every operation is quantized but those of `HALF`; otherwise the layers with weights.
    """

    name: str
    activation_bits: int | None = None
    whole: bool = False

    @property
    def quantized(self) -> bool:
        return self.activation_bits is not None

    @property
    def gate(self) -> str:
        """Its key in `GATES_PSNR_DB`."""
        return f"htp-{self.name}"


_FORMATS = (
    NumberFormat("fp16"),
    # What Qualcomm ships for Stable Diffusion.
    NumberFormat("w8a16", 16, whole=True),
    # Everything in 8 bits left 29.0 dB of what the demo student's decoder makes, layers alone 32.4
    # (ONNX Runtime's own arithmetic on the quantized file).
    NumberFormat("w8a8", 8),
)
FORMATS = {each.name: each for each in _FORMATS}

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# In 16 bits Qualcomm's compiler (SDK 2.51) makes a sigmoid, and a product that one goes into, that
# its emulator computes wrongly for some shapes: 19 dB in a (1, 512, 4, 4), where ONNX Runtime's
# own arithmetic on the same file has 90. So every product and sigmoid stays in half.
HALF = ("Mul", "Sigmoid")


def format_named(name: str) -> NumberFormat:
    """By name; raises `UsageError`."""
    if name not in FORMATS:
        raise unknown_name("precision", name, tuple(FORMATS))
    return FORMATS[name]
