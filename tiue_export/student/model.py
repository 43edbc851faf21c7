"""The student in PyTorch: the differentiable reference that every exported graph is held against.

It wraps diffusers' own UNet modules; nothing of their forward is copied. One pass of the encoder
at t_K, one batched pass of the decoder over K timesteps (rows step-major: row k*B + b), and the
closed formula in float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tiue_export.bundle.manifest import Source
from tiue_export.sampling.plan import Combination, Plan, Timestep
from tiue_export.student.added_conditions import added_embedding, token_text, with_joined_text
from tiue_export.student.up_path import cut_up_path, run_up_blocks, skip_count, text_for


class Features(NamedTuple):
    """What the UNet's encoder hands to its decoder: mid (B, C, h, w) and all skips in order.

    Of a UNet without a mid block mid is the last skip, as in diffusers.
    """

    mid: Tensor
    skips: tuple[Tensor, ...]


class Prediction(NamedTuple):
    """One pass of the student: latents (B, 4, H, W) float32, outputs (K*B, 4, H, W) step-major."""

    latents: Tensor
    outputs: Tensor


_PX_PER_LATENT = 8


class Student(nn.Module):
    """A model and the plan it draws by: UNet, plan and, when known, text encoder and VAE decoder.

    `px_per_latent` is pixels per latent along one side, None for what the VAE says. `encode`,
    `decode` and `sample` are for plans of one pass (TiUE); other plans are run pass by
    pass (`sampling/sampler.py`). `controlnet` is a diffusers ControlNetModel that steers it.

    `unet` is a diffusers UNet2DConditionModel of the Stable Diffusion 1.x/2.x/XL kind,
    `text_encoder` a transformers CLIPTextModel, for SDXL a `PairedTextEncoder`, `vae` an
    AutoencoderKL or AutoencoderTiny. Text is (B, L, D) everywhere; SDXL's has one row more, which
    `student/added_conditions.py` explains.
    """

    def __init__(
        self,
        unet: Any,
        plan: Plan,
        *,
        source: Source,
        scheduler_config: dict[str, Any],
        text_encoder: Any | None = None,
        vae: Any | None = None,
        tokenizer_folder: Path | None = None,
        controlnet: Any | None = None,
        px_per_latent: int | None = None,
    ) -> None:
        super().__init__()
        self.px_per_latent = px_per_latent or vae_scale(vae)
        self.vae = vae
        self.unet = with_joined_text(unet, self.px_per_latent)
        self.text_encoder = text_encoder
        self.source = source
        self.scheduler_config = scheduler_config
        self.tokenizer_folder = tokenizer_folder
        self.plan = plan
        self.controlnet = controlnet

    def by_plan(self, plan: Plan) -> Student:
        """The same model drawn by another plan."""
        twin = Student(
            self.unet,
            plan,
            source=self.source,
            scheduler_config=self.scheduler_config,
            text_encoder=self.text_encoder,
            vae=self.vae,
            tokenizer_folder=self.tokenizer_folder,
            controlnet=self.controlnet,
            px_per_latent=self.px_per_latent,
        )
        twin.training = self.training  # its parts are the same modules: they keep their own mode
        return twin

    def of_parts(
        self,
        unet: Any | None = None,
        text_encoder: Any | None = None,
        vae: Any | None = None,
        controlnet: Any | None = None,
    ) -> Student:
        """Some parts alone beside a UNet, so that building their graphs costs only those."""
        return Student(
            self.unet if unet is None else unet,
            self.plan,
            source=self.source,
            scheduler_config=self.scheduler_config,
            text_encoder=text_encoder,
            vae=vae,
            controlnet=controlnet,
            px_per_latent=self.px_per_latent,
        ).eval()

    def encode(self, noise: Tensor, text: Tensor) -> Features:
        """Run conv_in, the down blocks and the mid block, if any, once, at the first timestep.

        `noise` (B, 4, H, W), each side a multiple of 2 ** (levels - 1); `text` (B, L, D).
        """
        unet = self.unet
        scaled = self.plan.passes[0].input.noise * noise
        noise, text = scaled.to(unet.dtype), text.to(unet.dtype)
        hidden = unet.conv_in(noise)
        text, time = self._conditions(text, hidden, self.plan.timesteps[:1])
        skips = [hidden]
        for block in unet.down_blocks:
            hidden, block_skips = block(hidden, time, **text_for(block, text))
            skips.extend(block_skips)
        if unet.mid_block is not None:
            hidden = unet.mid_block(hidden, time, **text_for(unet.mid_block, text))
        return Features(hidden, tuple(skips))

    def decode(self, features: Features, text: Tensor) -> Tensor:
        """Run the up blocks once over all K timesteps; returns the outputs (K*B, 4, H, W).

        With a fan-out those before it run on B rows, at the first timestep.
        """
        unet, steps = self.unet, self.plan.rows
        batch = len(features.mid)
        text, time = self._conditions(text.to(unet.dtype), features.skips[0], self.plan.timesteps)
        trunk, rows = cut_up_path(unet.up_blocks, self.plan.fan_out)
        left = skip_count(rows)
        shared = features.skips[left:]
        hidden = run_up_blocks(trunk, features.mid, shared, time[:batch], text)
        hidden = hidden.repeat(steps, 1, 1, 1)  # (K*B, C, h, w)
        skips = [skip.repeat(steps, 1, 1, 1) for skip in features.skips[:left]]
        hidden = run_up_blocks(rows, hidden, skips, time, text.repeat(steps, 1, 1))
        return output_head(unet, hidden)

    def _conditions(
        self, text: Tensor, latents: Tensor, timesteps: tuple[Timestep, ...]
    ) -> tuple[Tensor, Tensor]:
        """What attentions read of the text, (B, L, D), and the resnets' time, (K*B, D_t).

        `latents` (B, C, H, W) of any channels say the picture's size.
        """
        time = self.time_embedding(timesteps).repeat_interleave(len(text), 0)
        scale = self.px_per_latent
        size_px = scale * latents.shape[2], scale * latents.shape[3]
        added = added_embedding(self.unet, text, size_px)  # (B, D_t)
        if added is not None:
            time = time + added.repeat(len(timesteps), 1)
        return token_text(self.unet, text), time

    def combine(self, noise: Tensor, outputs: Tensor) -> Tensor:
        """Eq. 11 in float32: noise (B, 4, H, W) and outputs (K*B, 4, H, W) -> latents."""
        return combine(self.plan.latents, noise, outputs)

    def sample(self, noise: Tensor, text: Tensor) -> Tensor:
        """Noise (B, 4, H, W), text (B, L, D) -> latents (B, 4, H, W), float32, differentiable."""
        return self.predict(noise, text).latents

    def predict(self, noise: Tensor, text: Tensor) -> Prediction:
        """`sample`, together with the outputs that were combined; the training losses see both."""
        outputs = self.decode(self.encode(noise, text), text)
        return Prediction(self.combine(noise, outputs), outputs)

    forward = predict

    def time_embedding(self, timesteps: tuple[Timestep, ...]) -> Tensor:
        """Embeddings of the timesteps, (len(timesteps), D_t), in the UNet's dtype."""
        return time_embedding(self.unet, timesteps)


def vae_scale(vae: Any | None) -> int:
    """Pixels per latent along one side; that of all Stable Diffusion where there is no VAE."""
    if vae is None:
        return _PX_PER_LATENT
    widths = (
        getattr(vae.config, "decoder_block_out_channels", None) or vae.config.block_out_channels
    )
    return int(2 ** (len(widths) - 1))


def time_embedding(unet: Any, timesteps: tuple[Timestep, ...]) -> Tensor:
    """The UNet's own time MLP on `timesteps`; (len(timesteps), D_t)."""
    device = unet.conv_in.weight.device
    projected = unet.time_proj(torch.tensor(timesteps, device=device))
    embedded: Tensor = unet.time_embedding(projected.to(unet.conv_in.weight.dtype))
    return embedded


def output_head(unet: Any, hidden: Tensor) -> Tensor:
    """conv_norm_out, SiLU and conv_out: (N, C, H, W) -> (N, 4, H, W)."""
    output: Tensor = unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))
    return output


def combine(terms: Combination, noise: Tensor, outputs: Tensor) -> Tensor:
    """Eq. 11 in float32 whatever the inputs' precision: the sum amplifies errors fivefold."""
    weights = torch.tensor(terms.outputs, dtype=torch.float32, device=outputs.device)
    rows = outputs.float().reshape(len(weights), *noise.shape)  # (K, B, 4, H, W)
    latents: Tensor = terms.noise * noise.float() + (weights.view(-1, 1, 1, 1, 1) * rows).sum(0)
    return latents


def text_embedding(text_encoder: Any, input_ids: Tensor) -> Tensor:
    """Token ids (B, L) -> the text: the last layer's output (B, L, D), or SDXL's joined text.

    Where L is several times what the encoder reads, its rows are the chunks, put together again;
    the pooled text is the first chunk's.
    """
    positions = int(text_encoder.config.max_position_embeddings)
    length = input_ids.shape[1]
    if length > positions:
        input_ids = input_ids.reshape(-1, positions)
    embedding: Tensor = text_encoder(input_ids).last_hidden_state
    if length == positions:
        return embedding
    rows, width = embedding.shape[1:]
    if rows == positions:
        return embedding.reshape(-1, length, width)
    tokens = embedding[:, :positions].reshape(-1, length, width)
    pooled = embedding[:, positions:].reshape(-1, length // positions, width)[:, :1]
    return torch.cat([tokens, pooled], 1)
