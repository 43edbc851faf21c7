"""The shapes of a student's tensors under given options, worked out once."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tiue_export.drawing.tokenizer import MAX_CHUNKS
from tiue_export.errors import UsageError
from tiue_export.graphs.options import ExportOptions
from tiue_export.student.added_conditions import pooled_rows
from tiue_export.student.model import Student

_SD_SCALING, _SDXL_SCALING = 0.18215, 0.13025  # what latents are divided by before the VAE
_SMALLEST_TILE = 8  # latents: below, group norms have too few values to tell anything


@dataclass(frozen=True)
class Shapes:
    """`latents` (B, 4, H, W), `text` (B, L, D), `vae_input` (B, 4, h, w): all latents or one tile.

    `vae_scale` is pixels per latent along one side; latents are divided by `vae_scaling_factor`
    before the VAE (1.0 for AutoencoderTiny). L is `tokens`, `text_chunks` times what the text
    encoder reads, and SDXL's row of pooled text.
    """

    latents: tuple[int, int, int, int]
    text: tuple[int, int, int]
    vae_input: tuple[int, int, int, int]
    vae_scale: int
    vae_scaling_factor: float
    text_chunks: int
    tokens: int

    @property
    def picture_px(self) -> tuple[int, int]:
        """Height and width of a picture."""
        return self.latents[2] * self.vae_scale, self.latents[3] * self.vae_scale


def shapes_of(student: Student, options: ExportOptions | None = None) -> Shapes:
    """Raises `UsageError` for sizes that the UNet cannot halve evenly, and for such tiles."""
    options = options or ExportOptions()
    scale = student.px_per_latent
    latents = _latents(student, options, scale)
    text_encoder, vae = student.text_encoder, student.vae
    length = 77 if text_encoder is None else int(text_encoder.config.max_position_embeddings)
    chunks = _text_chunks(options.max_prompt_tokens, length - 2)
    usual = _SDXL_SCALING if pooled_rows(student.unet) else _SD_SCALING
    tokens, width = chunks * length, int(student.unet.config.cross_attention_dim)
    return Shapes(
        latents=latents,
        text=(latents[0], tokens + pooled_rows(student.unet), width),
        tokens=tokens,
        vae_input=_vae_input(latents, options.vae_tile, scale),
        vae_scale=scale,
        vae_scaling_factor=usual if vae is None else float(vae.config.scaling_factor),
        text_chunks=chunks,
    )


def with_vae_precision(student: Student, options: ExportOptions) -> ExportOptions:
    """The options with float32 for a VAE that says of itself that half precision overflows in it.

    SDXL's does (`force_upcast`), its fp16 fix says the contrary; a precision that was chosen
    stands. diffusers takes true where nothing is said, as in Stable Diffusion 1.x, whose VAE does
    not overflow: that is left to the audit.
    """
    upcast = student.vae is not None and bool(student.vae.config.get("force_upcast"))
    sdxl = pooled_rows(student.unet) > 0
    if options.precision != "fp16" or options.vae_precision != "auto" or not (upcast and sdxl):
        return options
    return replace(options, vae_precision="fp32")


def _text_chunks(tokens: int | None, size: int) -> int:
    """How many chunks of `size` words' tokens a prompt of the longest kind fills."""
    if tokens is None:
        return 1
    chunks, rest = divmod(tokens, size)
    if rest or not 1 <= chunks <= MAX_CHUNKS:
        near = min(max(1, -(-tokens // size)), MAX_CHUNKS) * size
        raise UsageError(
            f"--max-prompt-tokens is {tokens}; expected a multiple of {size}, which the text "
            f"encoder reads at once, up to {MAX_CHUNKS * size}",
            f"Write --max-prompt-tokens {near}.",
        )
    return chunks


def _latents(student: Student, options: ExportOptions, scale: int) -> tuple[int, int, int, int]:
    config = student.unet.config
    own = config.sample_size or 64
    own_height, own_width = own if isinstance(own, (list, tuple)) else (own, own)
    height = own_height * scale if options.height is None else options.height
    width = own_width * scale if options.width is None else options.width
    multiple = scale * 2 ** (len(config.block_out_channels) - 1)
    for name, side in (("--height", height), ("--width", width)):
        if side < multiple or side % multiple:
            near = max(multiple, round(side / multiple) * multiple)
            raise UsageError(
                f"{name} is {side}; expected a multiple of {multiple} px for this student",
                f"The nearest is {name} {near}.",
            )
    return options.example_batch, 4, height // scale, width // scale


def _vae_input(
    latents: tuple[int, int, int, int], tile: int | None, scale: int
) -> tuple[int, int, int, int]:
    batch, channels, height, width = latents
    if tile is None:
        return latents
    smallest, largest = _SMALLEST_TILE * scale, max(height, width) * scale - scale
    if not smallest <= tile <= largest or tile % scale:
        raise UsageError(
            f"--vae-tile is {tile}; expected a multiple of {scale} from {smallest} to {largest}, "
            f"as pictures are {width * scale}x{height * scale} px",
            "Leave it out to decode pictures whole.",
        )
    return batch, channels, min(height, tile // scale), min(width, tile // scale)
