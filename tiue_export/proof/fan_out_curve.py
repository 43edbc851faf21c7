"""What parting late costs a student, place by place: the outcome of `--fan-out auto`."""

from __future__ import annotations

from dataclasses import dataclass

from tiue_export.sampling.fan_out import FanOut


@dataclass(frozen=True)
class FanOutPoint:
    """Rows that part at `fan_out`: operations of encoder and decoder for one picture, and the
    latents' PSNR against the student's own (`IDENTICAL_DB` where nothing changes)."""

    fan_out: FanOut
    gflop: float
    psnr_db: float


@dataclass(frozen=True)
class FanOutCurve:
    """Every place where a student's rows can part, in order; `inputs` says what was drawn.

    `target_psnr_db` is what the place that is taken must keep of the latents.
    """

    points: tuple[FanOutPoint, ...]
    inputs: str
    target_psnr_db: float

    @property
    def taken(self) -> FanOutPoint:
        """The deepest place that keeps the target; the student's own loses nothing."""
        own, *others = self.points
        return [own, *(point for point in others if point.psnr_db >= self.target_psnr_db)][-1]
