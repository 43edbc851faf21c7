"""Train the pair of linear maps that says how well a picture fits its prompt, as CLIP does.

The text encoder (its end-of-text state) and the feature network stay as they are; one map each
takes them into a common space, trained contrastively on drawings and their captions. Pictures of
the same emoji on another ground are among the wrong answers, so that the ground counts too.
quality_files.py runs it: two minutes, most of them drawing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from tiue_export.benchmarks.quality.yardstick import (
    FEATURE_WIDTH,
    Alignment,
    FeatureNetwork,
    Prompt,
)
from tiue_export.checkpoint.parts import load_text_encoder
from tiue_export.checkpoint.tokenizer_files import tokenizer_of
from tiue_export.drawing.tokenizer import Tokenizer
from tiue_export.errors import UsageError
from tiue_export.train.loop import Stateful, train
from tiue_export.train.run_folder import RunFolder

from .corpus import Emoji, fingerprint
from .drawing import draw

_DRAWINGS, _BATCHES = 4, 5  # streams of one seed, beside those of feature_network


@dataclass(frozen=True)
class AlignmentSettings:
    """What decides the outcome; `names` emoji a step, two drawings of each."""

    drawings: int = 24
    steps: int = 1000
    names: int = 128
    learning_rate: float = 2e-3
    temperature: float = 0.05
    seed: int = 0


@dataclass(frozen=True)
class Pairs:
    """Drawings with their captions, rows ordered drawing by drawing: row i shows emoji i % C.

    `features` (N, 128) and `texts` (N, D) are the frozen networks' outputs; `grounds` (N,) index
    the backgrounds and `named` (N,) says whether the caption names them.
    """

    features: Tensor
    texts: Tensor
    grounds: Tensor
    named: Tensor
    names: int

    def rows(self, chosen: Tensor) -> Pairs:
        """Some of the pairs."""
        return Pairs(
            self.features[chosen],
            self.texts[chosen],
            self.grounds[chosen],
            self.named[chosen],
            self.names,
        )


class TextStates:
    """The end-of-text states of a pipeline's text encoder, frozen and in float32."""

    def __init__(self, pipeline: Path) -> None:
        folder = pipeline / "text_encoder"
        if not folder.is_dir():
            raise UsageError(
                f"{pipeline} has no text_encoder/", "Give a diffusers pipeline folder."
            )
        self.encoder: Any = load_text_encoder(folder).float().eval()
        length = int(self.encoder.config.max_position_embeddings)
        self.tokenizer: Tokenizer = tokenizer_of(pipeline / "tokenizer", length)

    @property
    def sha256(self) -> str:
        """Of all weights: another text encoder needs another map."""
        digest = hashlib.sha256()
        for tensor in self.encoder.state_dict().values():
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def __call__(self, texts: list[str], batch: int = 64) -> Tensor:
        """Texts -> (N, D) float32."""
        rows = []
        for start in range(0, len(texts), batch):
            ids = torch.from_numpy(self.tokenizer(texts[start : start + batch]))
            rows.append(self.encoder(ids).pooler_output)
        return torch.cat(rows)


class Maps(nn.Module):
    """Two linear maps into one space, without biases."""

    def __init__(self, text_width: int) -> None:
        super().__init__()
        self.text = nn.Linear(text_width, FEATURE_WIDTH, bias=False)
        self.picture = nn.Linear(FEATURE_WIDTH, FEATURE_WIDTH, bias=False)

    def cosines(self, pairs: Pairs) -> Tensor:
        """Cosine of every text (row) with every picture (column)."""
        texts = functional.normalize(self.text(pairs.texts))
        return texts @ functional.normalize(self.picture(pairs.features)).T


def train_alignment(
    corpus: tuple[Emoji, ...],
    network: FeatureNetwork,
    pipeline: Path,
    out: Path,
    settings: AlignmentSettings,
    prompts: tuple[Prompt, ...],
) -> Alignment:
    """Train, or go on training, in `out`; returns the maps applied to `prompts`."""
    states = TextStates(pipeline)
    weights = network.state_dict().values()
    run = RunFolder(
        out,
        {
            **asdict(settings),
            "corpus": fingerprint(corpus),
            "text_encoder": states.sha256,
            "network": hashlib.sha256(b"".join(w.numpy().tobytes() for w in weights)).hexdigest(),
        },
    )
    pairs = drawn_pairs(corpus, network, states, settings)
    torch.manual_seed(settings.seed)
    maps = Maps(pairs.texts.shape[1])
    optimizer = torch.optim.AdamW(maps.parameters(), weight_decay=0.1)
    training_rows = (settings.drawings - 1) * len(corpus)

    def one_step(step: int) -> Mapping[str, float]:
        rate = settings.learning_rate * 0.5 * (1 + np.cos(np.pi * step / settings.steps))
        for group in optimizer.param_groups:
            group["lr"] = float(rate)
        loss = contrastive_loss(maps, pairs.rows(_chosen(pairs, settings, step)), settings)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        return {"loss": loss.item()}

    parts: dict[str, Stateful] = {"maps": maps, "optimizer": optimizer}
    train(run, parts, settings.steps, one_step, title="text alignment")
    with torch.no_grad():
        held_out = pairs.rows(torch.arange(training_rows, len(pairs.features)))
        texts = functional.normalize(maps.text(states([prompt.text for prompt in prompts])))
        return Alignment(
            text=texts.numpy(),
            picture_map=maps.picture.weight.numpy(),
            held_out={"text_to_picture_top1": matched_share(maps.cosines(held_out), held_out)},
        )


def drawn_pairs(
    corpus: tuple[Emoji, ...],
    network: FeatureNetwork,
    states: TextStates,
    settings: AlignmentSettings,
) -> Pairs:
    """`drawings` drawings of every emoji with their captions, through both frozen networks."""
    features, texts, grounds, named = [], [], [], []
    for drawing in range(settings.drawings):
        generator = np.random.default_rng([settings.seed, _DRAWINGS, drawing])
        drawn = [draw(emoji, generator) for emoji in corpus]
        features.append(network.features_of(np.stack([item.picture for item in drawn])))
        texts.append(states([item.caption for item in drawn]))
        grounds += [item.ground for item in drawn]
        named += [item.caption.endswith(" background") for item in drawn]
    return Pairs(
        torch.from_numpy(np.concatenate(features)),
        torch.cat(texts),
        torch.tensor(grounds),
        torch.tensor(named),
        len(corpus),
    )


def fitting(pairs: Pairs, shown: Tensor) -> Tensor:
    """(N, N) bool: does text i describe picture j? `shown` (N,) says which emoji each row shows."""
    same_ground = pairs.grounds[:, None] == pairs.grounds[None]
    return (shown[:, None] == shown[None]) & (same_ground | ~pairs.named[:, None])


def contrastive_loss(maps: Maps, pairs: Pairs, settings: AlignmentSettings) -> Tensor:
    """InfoNCE both ways (Radford et al. 2021); other right answers are no wrong ones."""
    count = len(pairs.features)
    shown = torch.arange(count) % (count // 2)
    others = fitting(pairs, shown) & ~torch.eye(count, dtype=torch.bool)
    logits = (maps.cosines(pairs) / settings.temperature).masked_fill(others, -torch.inf)
    own = torch.arange(count)
    return (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2


def matched_share(cosines: Tensor, pairs: Pairs) -> float:
    """Share of texts whose nearest picture fits them; one row per emoji."""
    shown = torch.arange(len(cosines)) % pairs.names
    return float(fitting(pairs, shown)[shown, cosines.argmax(1)].float().mean())


def _chosen(pairs: Pairs, settings: AlignmentSettings, step: int) -> Tensor:
    """Rows of two training drawings of some emoji: the first drawings, then the second."""
    generator = np.random.default_rng([settings.seed, _BATCHES, step])
    count = min(settings.names, pairs.names)
    names = generator.choice(pairs.names, count, replace=False)
    drawings = np.stack(
        [generator.choice(settings.drawings - 1, 2, replace=False) for _ in range(count)], 1
    )
    return torch.from_numpy((drawings * pairs.names + names).ravel())
