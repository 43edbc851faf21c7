"""`tiue-export audit`."""

from __future__ import annotations

from ..options.audit import AuditRequest
from ..options.group import command


@command
def audit(request: AuditRequest) -> None:
    """Show how near a student's values come to half precision's limit, and what must stay float32.

    Example:  tiue-export audit --ckpt student.safetensors --base sd21-base/ --prompts prompts.txt
    """
    from ..overflow_audit import run

    run(request)
