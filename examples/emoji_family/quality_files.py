"""Write the quality data that ships with the demo: what `benchmarks/quality` measures with.

    python -m emoji_family.quality_files --network RUN --pipeline TEACHER --alignment RUN2 \
        --out ../tiue_export/demo/quality

Without --pipeline and --alignment it is written without the text side; the measure of alignment is
then left out. Needs the Debian packages that the pictures come from; what it writes does not.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from tiue_export.benchmarks.quality.yardstick import (
    FeatureNetwork,
    Prompt,
    QualityData,
    save_quality_data,
)
from tiue_export.errors import TiueError, UsageError
from tiue_export.specs import Array

from .corpus import Emoji, demo_names, fingerprint
from .drawing import BACKGROUNDS, draw
from .feature_network import (
    PROTOTYPE_STREAMS,
    REFERENCE_STREAMS,
    add_corpus_arguments,
    corpus_and_settings,
    held_out_accuracy,
    held_out_features,
    load_feature_network,
    prototypes_of,
)
from .text_alignment import AlignmentSettings, train_alignment

_PROMPTS, _REAL = 6, 7  # streams, beside those of the trainings
REAL_PER_PROMPT = 2
CAPTIONS_PER_NAME = 13
_PROBE_PX = 8


def fixed_prompts(corpus: tuple[Emoji, ...], names: Collection[str]) -> tuple[Prompt, ...]:
    """Thirteen different captions of each emoji in `names`, distributed as in training.

    About 60 % name a ground. The other emoji are what a picture can be mistaken for.
    """
    generator = np.random.default_rng(_PROMPTS)
    prompts: list[Prompt] = []
    for index, emoji in enumerate(corpus):
        if emoji.name in names:
            prompts += _captions(emoji, index, generator)
    return tuple(prompts)


def _captions(emoji: Emoji, index: int, generator: np.random.Generator) -> list[Prompt]:
    captions: dict[str, Prompt] = {}
    while len(captions) < CAPTIONS_PER_NAME:
        drawn = draw(emoji, generator, _PROBE_PX)
        ground = list(BACKGROUNDS)[drawn.ground]
        named = drawn.caption.endswith(f" {ground} background")
        captions[drawn.caption] = Prompt(drawn.caption, index, ground if named else None)
    return list(captions.values())


def real_pictures(corpus: tuple[Emoji, ...], prompt: Prompt, count: int) -> Array:
    """Drawings whose caption is the prompt: (count, 128, 128, 3) uint8."""
    return np.stack(list(itertools.islice(_captioned(corpus[prompt.name], prompt), count)))


def _captioned(emoji: Emoji, prompt: Prompt) -> Iterator[Array]:
    """Drawings of `emoji` with this caption, found by drawing small ones until the caption fits."""
    for attempt in itertools.count():
        seed = [_REAL, prompt.name, attempt]
        if draw(emoji, np.random.default_rng(seed), _PROBE_PX).caption == prompt.text:
            yield draw(emoji, np.random.default_rng(seed)).picture


def quality_data(
    corpus: tuple[Emoji, ...], network: FeatureNetwork, shown: Collection[str]
) -> QualityData:
    """Everything but the text side; a few minutes for the whole corpus."""
    prompts = fixed_prompts(corpus, shown)
    features = held_out_features(network, corpus, PROTOTYPE_STREAMS)
    prototypes = prototypes_of(network.embeddings_of(features), len(corpus))
    reference = held_out_features(network, corpus, REFERENCE_STREAMS)
    real = [
        network.features_of(real_pictures(corpus, prompt, REAL_PER_PROMPT)) for prompt in prompts
    ]
    return QualityData(
        network=network,
        names=tuple(emoji.name for emoji in corpus),
        prompts=prompts,
        grounds=BACKGROUNDS,
        prototypes=prototypes,
        reference=reference.reshape(len(REFERENCE_STREAMS), len(corpus), -1),
        real=np.stack(real, 1),
        corpus_sha256=fingerprint(corpus),
        held_out=held_out_accuracy(network, corpus, prototypes),
    )


def aligned(data: QualityData, corpus: tuple[Emoji, ...], pipeline: Path, run: Path) -> QualityData:
    """`data` with the text side; `run` is the folder of its training, two minutes.

    It is trained on the emoji of the prompts alone: the others are forgotten by the text encoder
    of a teacher that ended with these.
    """
    shown = sorted({prompt.name for prompt in data.prompts})
    alignment = train_alignment(
        tuple(corpus[name] for name in shown),
        data.network,
        pipeline,
        run,
        AlignmentSettings(),
        data.prompts,
    )
    return dataclasses.replace(data, alignment=alignment)


def main() -> None:
    """Write the folder and say what is in it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--network", type=Path, required=True, help="run of feature_network")
    parser.add_argument("--pipeline", type=Path, help="folder with the text encoder to align with")
    parser.add_argument("--alignment", type=Path, help="folder of the alignment's run, resumable")
    parser.add_argument("--out", type=Path, required=True)
    add_corpus_arguments(parser)
    arguments = parser.parse_args()
    try:
        if (arguments.pipeline is None) != (arguments.alignment is None):
            raise UsageError("--pipeline and --alignment go together", "Give both or neither.")
        corpus, settings = corpus_and_settings(arguments)
        network = load_feature_network(corpus, arguments.network, settings)
        data = quality_data(corpus, network, demo_names())
        if arguments.pipeline is not None:
            data = aligned(data, corpus, arguments.pipeline, arguments.alignment)
        save_quality_data(data, arguments.out)
    except TiueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    measured = {**data.held_out, **(data.alignment.held_out if data.alignment else {})}
    for name, share in measured.items():
        print(f"{name} {100 * share:.1f} %")
    size_bytes = sum(file.stat().st_size for file in arguments.out.iterdir())
    print(f"{arguments.out}: {len(data.prompts)} prompts, {size_bytes / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
