"""Train the feature network that picture quality is measured with, on drawn pictures alone.

    python -m emoji_family.feature_network --out RUN    (from examples/; 20 minutes of one core)

It learns three things at once, so that its features hold more than a name: which emoji it is (also
when blurred and noisy, as a generator draws it), what a coarse copy of the picture looks like
(place, size, tilt, side, colours), and how blurred the picture is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from math import cos, pi
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.nn import functional

from tiue_export.benchmarks.quality.yardstick import FEATURE_WIDTH, FeatureNetwork, network_input
from tiue_export.errors import TiueError, UsageError
from tiue_export.specs import Array
from tiue_export.train.cpu_precision import cpu_autocast, cpu_precision
from tiue_export.train.loop import Stateful, train
from tiue_export.train.run_folder import RunFolder

from .corpus import Emoji, fingerprint, told_apart
from .drawing import draw

_TRAINING, _NOISE, _HELD_OUT = 1, 2, 3  # streams of one seed
# Streams of held-out drawings; no drawing serves two ends.
TEST_STREAM = 0
PROTOTYPE_STREAMS = range(1, 9)
# More than the neighbours that precision and recall look at (NEAREST in quality_metrics.py): with
# fewer, a picture's neighbourhood spans several emoji, and noise would pass for real.
REFERENCE_STREAMS = range(9, 17)
_THUMBNAIL_PX = 16
_WARM_UP_STEPS = 100


@dataclass(frozen=True)
class FeatureSettings:
    """What decides the outcome; `batch` pictures of 128 px a step."""

    steps: int = 2400
    batch: int = 96
    learning_rate: float = 2e-3
    weight_decay: float = 0.02
    # Sharpens the cosine softmax: e^20 lets one of 500 classes reach probability 1.
    logit_scale: float = 20.0
    thumbnail_weight: float = 4.0
    blur_weight: float = 0.5
    blurred_share: float = 0.5
    max_blur_px: float = 2.5
    max_noise: float = 0.08  # standard deviation, pictures in [-1, 1]
    seed: int = 0


@dataclass(frozen=True)
class Batch:
    """Pictures as drawn, and as the network sees them: some blurred, by `blur_px`."""

    names: Tensor  # (B,) indices into the corpus
    clean: Tensor  # (B, 3, 128, 128) in [-1, 1]
    seen: Tensor  # (B, 3, 128, 128)
    blur_px: Tensor  # (B,) standard deviation


class Heads(nn.Module):
    """What reads the features during training, and is thrown away."""

    def __init__(self, names: int, logit_scale: float) -> None:
        super().__init__()
        self.logit_scale = logit_scale
        self.classes = nn.Parameter(torch.randn(names, FEATURE_WIDTH))
        self.thumbnail = nn.Linear(FEATURE_WIDTH, 3 * _THUMBNAIL_PX**2)
        self.blur = nn.Linear(FEATURE_WIDTH, 1)

    def logits(self, embedding: Tensor) -> Tensor:
        """Unit vectors (B, 128) -> scaled cosines to every class (B, C)."""
        cosines: Tensor = embedding @ functional.normalize(self.classes).T
        return self.logit_scale * cosines


def train_feature_network(
    corpus: tuple[Emoji, ...], out: Path, settings: FeatureSettings, *, save_every: int = 200
) -> FeatureNetwork:
    """Train, or go on training, in `out`; returns the finished network, in eval mode."""
    run = open_run(corpus, out, settings)
    torch.manual_seed(settings.seed)
    network = FeatureNetwork()
    heads = Heads(len(corpus), settings.logit_scale)
    weights = [*network.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(weights, weight_decay=settings.weight_decay, betas=(0.9, 0.98))

    batches = _DrawnAhead(corpus, settings)

    def one_step(step: int) -> Mapping[str, float]:
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, settings)
        batch = batches.of(step)
        with cpu_autocast():
            features = network(batch.seen)
        loss, figures = feature_loss(network, heads, features, batch, settings)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        return figures

    parts: dict[str, Stateful] = {"network": network, "heads": heads, "optimizer": optimizer}
    train(
        run,
        parts,
        settings.steps,
        one_step,
        title="feature network",
        log_every=min(20, save_every),
        save_every=save_every,
    )
    return network.eval().requires_grad_(False)


class _DrawnAhead:
    """Batches, the next one drawn while this one is learnt: drawing is half of the time."""

    def __init__(self, corpus: tuple[Emoji, ...], settings: FeatureSettings) -> None:
        self._corpus, self._settings = corpus, settings
        self._thread = ThreadPoolExecutor(1)
        self._drawing: dict[int, Future[Batch]] = {}

    def of(self, step: int) -> Batch:
        batch = self._drawing.pop(step, None) or self._draw(step)
        self._drawing = {step + 1: self._draw(step + 1)}
        return batch.result()

    def _draw(self, step: int) -> Future[Batch]:
        return self._thread.submit(training_batch, self._corpus, self._settings, step)


def open_run(corpus: tuple[Emoji, ...], out: Path, settings: FeatureSettings) -> RunFolder:
    """The run's folder; another corpus or other settings in it are refused."""
    decides = {"corpus": fingerprint(corpus), "precision": cpu_precision()}
    return RunFolder(out, {**asdict(settings), **decides})


def load_feature_network(
    corpus: tuple[Emoji, ...], out: Path, settings: FeatureSettings
) -> FeatureNetwork:
    """The network of a finished run. Raises `UsageError` when it is not finished."""
    state = open_run(corpus, out, settings).load(truncate=False)
    done = 0 if state is None else int(state["step"])
    if state is None or done < settings.steps:
        raise UsageError(
            f"the run in {out} has done {done} of {settings.steps} steps",
            f"Let it finish: python -m emoji_family.feature_network --out {out}",
        )
    network = FeatureNetwork()
    network.load_state_dict(state["network"])
    return network.eval().requires_grad_(False)


def feature_loss(
    network: FeatureNetwork,
    heads: Heads,
    features: Tensor,
    batch: Batch,
    settings: FeatureSettings,
) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy of the name, squared errors of thumbnail and blur; and their figures."""
    logits = heads.logits(network.embed(features))
    naming = functional.cross_entropy(logits, batch.names)
    wanted = functional.adaptive_avg_pool2d(batch.clean, _THUMBNAIL_PX).flatten(1)
    thumbnail = (heads.thumbnail(features) - wanted).square().mean()
    blur = (heads.blur(features)[:, 0] - batch.blur_px).square().mean()
    loss = naming + settings.thumbnail_weight * thumbnail + settings.blur_weight * blur
    return loss, {
        "loss": loss.item(),
        "named": float((logits.argmax(1) == batch.names).float().mean()),
        "thumbnail_error": thumbnail.item() ** 0.5,
        "blur_error_px": blur.item() ** 0.5,
    }


def training_batch(corpus: tuple[Emoji, ...], settings: FeatureSettings, step: int) -> Batch:
    """The pictures of one step, the same for the same step."""
    generator = np.random.default_rng([settings.seed, _TRAINING, step])
    count = settings.batch
    names = generator.choice(len(corpus), count, replace=count > len(corpus))
    blur_px = generator.uniform(0.3, settings.max_blur_px, count)
    blur_px *= generator.random(count) < settings.blurred_share
    drawn = [draw(corpus[name], generator).picture for name in names]
    clean = network_input(np.stack(drawn))
    seen = network_input(blurred(drawn, blur_px))
    noise = torch.Generator().manual_seed(
        int(np.random.default_rng([settings.seed, _NOISE, step]).integers(2**31))
    )
    strength = settings.max_noise * torch.rand((count, 1, 1, 1), generator=noise)
    # Half of the pictures stay without noise, as the reference pictures are.
    strength *= torch.rand((count, 1, 1, 1), generator=noise) < 0.5
    seen = seen + strength * torch.randn(seen.shape, generator=noise)
    return Batch(torch.from_numpy(names), clean, seen, torch.from_numpy(blur_px).float())


def blurred(pictures: list[Array], blur_px: Array) -> Array:
    """Gaussian blur with one standard deviation a picture; 0 leaves it as it is. (B, H, W, 3)."""
    return np.stack(
        [
            np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(float(radius))))
            if radius > 0
            else picture
            for picture, radius in zip(pictures, blur_px, strict=True)
        ]
    )


def held_out_pictures(corpus: tuple[Emoji, ...], stream: int) -> Array:
    """One drawing of every emoji that no training step saw: (C, 128, 128, 3) uint8.

    Another `stream` gives other drawings.
    """
    generator = np.random.default_rng([_HELD_OUT, stream])
    return np.stack([draw(emoji, generator).picture for emoji in corpus])


def held_out_features(
    network: FeatureNetwork, corpus: tuple[Emoji, ...], streams: Iterable[int]
) -> Array:
    """Features (S * C, 128) of one held-out drawing of every emoji per stream.

    Row i shows emoji i % C.
    """
    return np.concatenate(
        [network.features_of(held_out_pictures(corpus, stream)) for stream in streams]
    )


def prototypes_of(embeddings: Array, names: int) -> Array:
    """Mean unit embedding per name; row i of `embeddings` (N, 128) shows name i % `names`."""
    means = embeddings.reshape(-1, names, embeddings.shape[1]).mean(0)
    prototypes: Array = means / np.linalg.norm(means, axis=1, keepdims=True)
    return prototypes


def named_share(embeddings: Array, prototypes: Array) -> float:
    """Share of embeddings whose nearest prototype is their own; rows as in `prototypes_of`."""
    nearest = (embeddings @ prototypes.T).argmax(1)
    return float((nearest == np.arange(len(embeddings)) % len(prototypes)).mean())


def held_out_accuracy(
    network: FeatureNetwork, corpus: tuple[Emoji, ...], prototypes: Array
) -> dict[str, float]:
    """Share of unseen drawings named rightly: as drawn, and blurred by 1 and by 2 px."""
    pictures = held_out_pictures(corpus, TEST_STREAM)
    accuracy = {}
    for blur_px in (0.0, 1.0, 2.0):
        seen = blurred(list(pictures), np.full(len(pictures), blur_px))
        embeddings = network.embeddings_of(network.features_of(seen))
        accuracy[f"top1_blur_{blur_px:.0f}px"] = named_share(embeddings, prototypes)
    return accuracy


def _learning_rate(step: int, settings: FeatureSettings) -> float:
    """Warm-up, then cosine decay to a hundredth."""
    decayed = 0.01 + 0.99 * 0.5 * (1 + cos(pi * step / settings.steps))
    return settings.learning_rate * min(1.0, (step + 1) / _WARM_UP_STEPS) * decayed


def add_corpus_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of every command here that say which network and which emoji are meant."""
    defaults = FeatureSettings()
    parser.add_argument("--emoji", type=int, help="only so many, spread over all; for a trial")
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--batch", type=int, default=defaults.batch)


def corpus_and_settings(arguments: Any) -> tuple[tuple[Emoji, ...], FeatureSettings]:
    """What the options of `add_corpus_arguments` mean."""
    corpus = told_apart()
    if arguments.emoji is not None:
        corpus = corpus[:: max(1, len(corpus) // arguments.emoji)][: arguments.emoji]
    return corpus, FeatureSettings(steps=arguments.steps, batch=arguments.batch)


def main() -> None:
    """Train, then print the accuracy on held-out drawings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run, resumable")
    add_corpus_arguments(parser)
    arguments = parser.parse_args()
    try:
        corpus, settings = corpus_and_settings(arguments)
        network = train_feature_network(corpus, arguments.out, settings)
        features = held_out_features(network, corpus, PROTOTYPE_STREAMS)
        prototypes = prototypes_of(network.embeddings_of(features), len(corpus))
        for name, share in held_out_accuracy(network, corpus, prototypes).items():
            print(f"{name} {100 * share:.1f} %")
    except TiueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
