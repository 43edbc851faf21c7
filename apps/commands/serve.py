"""`tiue-export serve`."""

from __future__ import annotations

from ..options.group import command
from ..options.serve import ServeOptions, ServerLimits


@command
def serve(request: ServeOptions, limits: ServerLimits) -> None:
    """Serve a bundle over HTTP, as OpenAI's images API: existing clients draw from it.

    Example:  tiue-export serve fox --port 8000

    Example:  tiue-export serve fox --runtime trt --host 0.0.0.0 --token-file token.txt
    """
    from ..server.serving import run

    run(request, limits)
