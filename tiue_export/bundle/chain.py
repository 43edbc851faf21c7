"""The chain of graphs as data: which output of which graph feeds which input.

A tensor is the same value in every graph that has it under that name; the bundle keeps optimum's
tensor names, so two tensors are not called what their value is. One value is computed between
graphs: the VAE takes latents divided by its scaling factor. Pipeline, proof, audit, the
buffers of device runtimes, benchmarks and Triton's ensemble all read this file.

A plan in passes runs the UNet's graphs by itself (`sampling/sampler.py`); the chain leads there and
on from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from tiue_export.sampling.plan import Plan
from tiue_export.specs import TEXT_ENCODER, VAE_DECODER, VAE_ENCODER, Array, Feeds, GraphSpec

# Values: tokens (B, L) int64, text (B, L, D), noise and latents (B, 4, H, W), scaled latents of the
# same shape or one tile of them, picture (B, 3, 8H, 8W).
TOKENS = "input_ids"
TEXT = "encoder_hidden_states"
NOISE = "sample"
LATENTS = "latents"
SCALED_LATENTS = "latent_sample"
PICTURE = "picture"
# Where drawing starts from a picture: that (B, 3, 8H, 8W) in [-1, 1], and what its latents are
# drawn from, mean and logarithm of the variance (B, 8, H, W) or, of AutoencoderTiny, latents.
SOURCE_PICTURE = "source_picture"
LATENT_PARAMETERS = "latent_parameters"

# Of a plan in passes: the prompt's embedding (B, L, D), one half of the text with guidance.
PROMPT_TEXT = "prompt_embeds"


@dataclass(frozen=True)
class Chain:
    """Names of values where they differ from the tensors': (graph, tensor) -> value."""

    renamed: Mapping[tuple[str, str], str]

    def value(self, graph: str, tensor: str) -> str:
        """The value that a graph's tensor holds."""
        return self.renamed.get((graph, tensor), tensor)

    def feeds(self, spec: GraphSpec, values: Feeds) -> dict[str, Array]:
        """A graph's inputs out of the values so far, each checked against its spec."""
        tensors = {
            value: tensor for (graph, tensor), value in self.renamed.items() if graph == spec.name
        }
        return spec.select({tensors.get(value, value): array for value, array in values.items()})

    def values(self, graph: str, outputs: Feeds) -> dict[str, Array]:
        """A graph's outputs under the names of their values."""
        return {self.value(graph, tensor): array for tensor, array in outputs.items()}


ONE_PASS = Chain(
    MappingProxyType(
        {
            (TEXT_ENCODER, "last_hidden_state"): TEXT,
            (VAE_DECODER, "sample"): PICTURE,
            (VAE_ENCODER, "sample"): SOURCE_PICTURE,
            (VAE_ENCODER, SCALED_LATENTS): LATENT_PARAMETERS,
        }
    )
)
IN_PASSES = Chain(
    MappingProxyType({**ONE_PASS.renamed, (TEXT_ENCODER, "last_hidden_state"): PROMPT_TEXT})
)


def chain_of(plan: Plan) -> Chain:
    """The chain that a plan's graphs make."""
    return ONE_PASS if plan.one_pass else IN_PASSES


def scaled_latents(latents: Array, vae_scaling_factor: float) -> Array:
    """What the VAE decoder takes, float32: the only value that is computed between graphs."""
    scaled: Array = (latents / vae_scaling_factor).astype(np.float32)
    return scaled
