"""`tiue-export bench`."""

from __future__ import annotations

from ..options.bench import BenchRequest
from ..options.group import command


@command
def bench(request: BenchRequest) -> None:
    """Measure latency and memory side by side: each contender in its own process, in turn.

    Lists may be given between commas.

    Example:  tiue-export bench fox --ckpt student.safetensors --base sd21-base/ --out now.json

    Example:  tiue-export bench old new --unet-only --fail-if-slower 5%

    Example:  tiue-export bench --compare before.json now.json --fail-if-slower 5%
    """
    from ..bench import run

    run(request)
