"""Text embeddings of what was drawn last: another seed of a prompt runs no text encoder."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock

from tiue_export.specs import Array

_KEPT = 16  # 5 MB of single prompts at Stable Diffusion 2's (77, 1024) in float32


class TextMemory:
    """Token ids (B, L) -> text embedding (B, L, D), by whole batches.

    What was not asked for longest is forgotten.
    """

    def __init__(self, kept: int = _KEPT) -> None:
        self._kept = kept
        self._texts: OrderedDict[tuple[tuple[int, ...], bytes], Array] = OrderedDict()
        self._lock = Lock()  # a server draws and answers in threads

    def embedding(self, tokens: Array, embed: Callable[[], Array]) -> Array:
        """What is known of these tokens, else what `embed` makes of them; the caller's own."""
        key = tokens.shape, tokens.tobytes()
        with self._lock:
            if key in self._texts:
                self._texts.move_to_end(key)
                return self._texts[key].copy()
        text = embed()
        with self._lock:
            self._texts[key] = text.copy()  # a runtime may use its buffers again
            while len(self._texts) > self._kept:
                self._texts.popitem(last=False)
        return text
