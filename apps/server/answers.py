"""What goes over the wire: requests and answers of the OpenAI images API.

Field names follow https://platform.openai.com/docs/api-reference/images.
Seeds, warnings and the model's name are additions; clients ignore what they do not know.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model

from tiue_export.sampling.plan import GUIDANCE_RANGE

from .settings import ServerSettings


class ImageAnswer(BaseModel):
    """One picture: a PNG file in base64, or a link to it."""

    b64_json: str | None = Field(None, description="A PNG file in base64.")
    url: str | None = Field(None, description="Where the PNG file lies for a while.")
    seed: int = Field(description="Asked for again with n=1, this seed draws the same picture.")


class ImagesAnswer(BaseModel):
    """The pictures of one request, in the order of their seeds."""

    created: int = Field(description="Unix time in seconds.")
    data: list[ImageAnswer]
    model: str
    output_format: Literal["png"] = "png"
    size: str
    warnings: list[str] | None = Field(None, description="What was done other than asked.")


class ModelAnswer(BaseModel):
    """A model that requests may name."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelsAnswer(BaseModel):
    """Every model that requests may name."""

    object: Literal["list"] = "list"
    data: list[ModelAnswer]


class HealthAnswer(BaseModel):
    """Whether pictures are being drawn."""

    status: Literal["ok", "closing", "failing", "stopped"]
    model: str
    runtime: str
    waiting_pictures: int


def _whole(value: Any) -> Any:
    """JSON has one kind of number: 7.0 is the integer 7."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _integer(least: int, most: int) -> Any:
    return Annotated[int, Field(ge=least, le=most), BeforeValidator(_whole)] | None


def image_request_model(
    settings: ServerSettings, model_names: tuple[str, ...], size: str, guidance: float | None
) -> type[BaseModel]:
    """The request of this server's bundle, with its bounds: they show in the OpenAPI page too.

    A student has its guidance in its weights (None); elsewhere it is the default to choose from.
    """
    limits = settings.limits
    formats: Any = Literal["b64_json", "url"] if settings.urls else Literal["b64_json"]
    names: Any = Literal[model_names]
    sizes: Any = Literal["auto", size]
    fields: dict[str, Any] = {
        "prompt": (str, Field(min_length=1, max_length=limits.prompt_characters)),
        "model": (names | None, Field(None, description="One of those at /v1/models.")),
        "n": (
            _integer(1, limits.pictures_per_request),
            Field(1, description="Pictures to draw."),
        ),
        "size": (sizes | None, Field("auto", description="The bundle's own size, or auto.")),
        "response_format": (formats | None, Field("b64_json")),
        "seed": (
            _integer(0, limits.max_seed),
            Field(None, description="Picture i is drawn from seed + i; left out, by chance."),
        ),
        "prompt_weights": (
            bool | None,
            Field(False, description="Read (word:1.3), ((word)) and [word] as weights."),
        ),
        "output_format": (Literal["png"] | None, Field("png")),
        "quality": (Literal["auto", "standard"] | None, Field("auto")),
        "background": (Literal["auto", "opaque"] | None, Field("auto")),
        "user": (str | None, Field(None, max_length=256, description="Accepted, not kept.")),
    }
    if guidance is not None:
        least, most = GUIDANCE_RANGE
        fields["guidance"] = (
            Annotated[float, Field(ge=least, le=most)] | None,
            Field(None, description=f"1 is none; left out, {guidance:g}."),
        )
        fields["negative_prompt"] = (
            Annotated[str, Field(max_length=limits.prompt_characters)] | None,
            Field(None, description="What the picture shall not show."),
        )
    # Strict: "2" is no number of pictures. Unknown fields are refused, never ignored in silence.
    config = ConfigDict(
        extra="forbid",
        strict=True,
        title="ImagesRequest",
        json_schema_extra={"examples": [{"prompt": "a red fox in the snow", "seed": 7}]},
    )
    model: type[BaseModel] = create_model("ImagesRequest", __config__=config, **fields)
    return model
