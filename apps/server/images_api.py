"""The HTTP application: OpenAI's images API over one drawing worker, health and metrics.

Annotations are read at run time here, some of them types made for the bundle at hand: this file
does not postpone them.
"""

import asyncio
import base64
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import FastAPI, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException

from tiue_export._version import __version__
from tiue_export.drawing.picture import png_bytes
from tiue_export.drawing.pipeline import Job, Picture
from tiue_export.drawing.prompt_weights import without_weights
from tiue_export.errors import TiueError, UsageError

from ..web.api_error import ApiError, ErrorAnswer
from ..web.hosts import TrustedHosts
from .answers import (
    HealthAnswer,
    ImageAnswer,
    ImagesAnswer,
    ModelAnswer,
    ModelsAnswer,
    image_request_model,
)
from .guard import RequestGuard, is_open
from .metrics import CONTENT_TYPE
from .picture_store import PictureStore
from .request_count import RequestCount
from .settings import ServerSettings
from .worker import Closing, DrawingWorker, Order, QueueFull

_CLIENT_GONE = 499
_DESCRIPTION = (
    "Pictures of one distilled Stable Diffusion student, in the form of OpenAI's images API."
)
_REFUSALS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorAnswer, "description": "The request cannot be honoured as it is."},
    429: {
        "model": ErrorAnswer,
        "description": "The queue is full; try again after the seconds in Retry-After.",
        "headers": {"Retry-After": {"schema": {"type": "integer", "minimum": 1}}},
    },
    500: {"model": ErrorAnswer, "description": "The runtime failed."},
    503: {"model": ErrorAnswer, "description": "The server is closing, or has no room."},
    504: {"model": ErrorAnswer, "description": "The picture was not ready in time."},
}

_ERROR_SCHEMA = {"$ref": "#/components/schemas/ErrorAnswer"}
_NO_TOKEN = {
    "description": "No or wrong token.",
    "content": {"application/json": {"schema": _ERROR_SCHEMA}},
}


class _ClientGone(Exception):
    """Nobody waits for the answer any more."""


class ImagesApi:
    """The endpoints, over an opened worker."""

    def __init__(self, worker: DrawingWorker, settings: ServerSettings) -> None:
        self.worker, self.settings = worker, settings
        pipeline = worker.pipeline
        bundle, manifest = pipeline.bundle, pipeline.bundle.manifest
        self.names = tuple(dict.fromkeys((bundle.root.resolve().name, *settings.model_names)))
        self.size = f"{manifest.width_px}x{manifest.height_px}"
        self.runtime = f"{pipeline.runtime.name} {pipeline.runtime.device}"
        self.created = int((bundle.root / "tiue.json").stat().st_mtime)
        self.store = PictureStore()
        worker.metrics.model.info(
            {
                "model": self.names[0],
                "runtime": self.runtime,
                "precision": pipeline.runtime.precision,
                "size": self.size,
                "version": __version__,
            }
        )

    def model(self, name: str) -> ModelAnswer:
        """One of the names of the one model."""
        if name not in self.names:
            raise self.unknown_model(name)
        return ModelAnswer(id=name, created=self.created, owned_by="tiue-export")

    def unknown_model(self, name: object) -> ApiError:
        """The error for a model that is not served."""
        return ApiError(
            404,
            f"no model {str(name)[:80]!r} here; expected {' or '.join(self.names)}",
            code="model_not_found",
            param="model",
        )

    def health(self, response: Response) -> HealthAnswer:
        """200 while pictures are being drawn, else 503."""
        fault = self.worker.fault
        response.status_code = 200 if fault is None else 503
        return HealthAnswer.model_validate(
            {
                "status": fault or "ok",
                "model": self.names[0],
                "runtime": self.runtime,
                "waiting_pictures": self.worker.waiting,
            }
        )

    async def generate(self, asked: Any, request: Request) -> ImagesAnswer:
        """Draw the pictures of one request and encode them, outside the drawing thread."""
        count = asked.n or 1
        seed = asked.seed
        if seed is None:
            seed = secrets.randbelow(self.settings.limits.max_seed + 1)
        # Only bundles with a plan of Faster Diffusion have these fields.
        negative = getattr(asked, "negative_prompt", None) or ""
        guidance = getattr(asked, "guidance", None)
        weighted = bool(asked.prompt_weights)
        words = _words(asked.prompt, "prompt") if weighted else asked.prompt
        if weighted:
            _words(negative, "negative_prompt")
        jobs = [Job(asked.prompt, seed + i, negative, guidance, weighted) for i in range(count)]
        pictures = await self._drawn(jobs, request)
        files = await asyncio.to_thread(self._files, pictures)
        if asked.response_format == "url":
            names = [self.store.add(png) for png in files]
            links = [str(request.url_for("picture_file", name=name)) for name in names]
            data = [
                ImageAnswer(b64_json=None, url=link, seed=seed + i) for i, link in enumerate(links)
            ]
        else:
            texts = [base64.b64encode(png).decode() for png in files]
            data = [
                ImageAnswer(b64_json=text, url=None, seed=seed + i) for i, text in enumerate(texts)
            ]
        return ImagesAnswer(
            created=int(time.time()),
            data=data,
            model=self.names[0],
            size=self.size,
            warnings=self._warnings(words),
        )

    async def _drawn(self, jobs: list[Job], request: Request) -> list[Picture]:
        try:
            order = self.worker.submit(jobs)
        except QueueFull as full:
            self._count_unserved("queue_full")
            raise ApiError(
                429,
                f"{full}",
                code="queue_full",
                headers={"Retry-After": str(full.retry_after_s)},
            ) from None
        except Closing:
            raise ApiError(503, "the server is closing", code="closing") from None
        try:
            return await self._awaited(order, request)
        except TiueError as error:
            self._count_unserved("failed")
            raise ApiError(500, error.message, code="runtime_failure") from error
        except asyncio.TimeoutError:
            self._count_unserved("timeout")
            timeout_s = self.settings.limits.timeout_s
            raise ApiError(504, f"not drawn within {timeout_s:g} s", code="timeout") from None
        except _ClientGone:
            self._count_unserved("client_gone")
            raise
        finally:
            self.worker.cancel(order)  # whatever ended the wait, nothing is drawn for nobody

    async def _awaited(self, order: Order, request: Request) -> list[Picture]:
        """The order's pictures, unless time runs out or the client goes away first."""
        drawn = asyncio.wrap_future(order.future)
        gone = asyncio.create_task(_disconnected(request))
        try:
            awaited: set[asyncio.Future[Any]] = {drawn, gone}
            done, _ = await asyncio.wait(
                awaited,
                timeout=self.settings.limits.timeout_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if drawn in done:
                return drawn.result()
            if gone in done:
                raise _ClientGone
            raise asyncio.TimeoutError
        finally:
            gone.cancel()
            drawn.cancel()

    def _files(self, pictures: list[Picture]) -> list[bytes]:
        return [png_bytes(picture.image, picture.parameters) for picture in pictures]

    def _warnings(self, prompt: str) -> list[str] | None:
        note = self.worker.pipeline.tokenizer.cut_note(prompt)
        return None if note is None else [note]

    def _count_unserved(self, reason: str) -> None:
        self.worker.metrics.refused.labels(reason).inc()


def _words(weighted: str, param: str) -> str:
    """A prompt without its weights; those that are refused are the client's mistake."""
    try:
        return without_weights(weighted)
    except UsageError as error:
        raise ApiError(400, error.message, code="invalid_value", param=param) from error


def create_app(worker: DrawingWorker, settings: ServerSettings) -> FastAPI:
    """The application over a worker that was started; it closes the worker when it shuts down."""
    api = ImagesApi(worker, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(worker.close)

    app = FastAPIOffline(
        title="tiue-export serve",
        description=_DESCRIPTION,
        version=__version__,
        redoc_url=None,
        lifespan=lifespan,
    )
    _add_routes(app, api)
    _add_error_forms(app, api)
    app.add_middleware(RequestGuard, limits=settings.limits, token=settings.token)
    app.add_middleware(TrustedHosts, hosts=settings.allowed_hosts)
    app.add_middleware(RequestCount, metrics=worker.metrics)
    if settings.token is not None:
        app.openapi = _with_token(app.openapi)  # type: ignore[method-assign]
    return app


def _add_routes(app: FastAPI, api: ImagesApi) -> None:
    asked_type = image_request_model(
        api.settings, api.names, api.size, api.worker.pipeline.bundle.manifest.plan.guidance
    )

    @app.post(
        "/v1/images/generations",
        response_model=ImagesAnswer,
        response_model_exclude_none=True,
        responses=_REFUSALS,
        summary="Draw pictures of a prompt",
    )
    async def generate(asked: asked_type, request: Request) -> Any:  # type: ignore[valid-type]
        try:
            return await api.generate(asked, request)
        except _ClientGone:
            return Response(status_code=_CLIENT_GONE)

    @app.get("/v1/models", summary="The model, under each of its names")
    async def models() -> ModelsAnswer:
        return ModelsAnswer(data=[api.model(name) for name in api.names])

    @app.get(
        "/v1/models/{name}",
        responses={"4XX": {"model": ErrorAnswer, "description": "There is no such model."}},
        summary="One model",
    )
    async def model(name: Annotated[str, Path(examples=list(api.names))]) -> ModelAnswer:
        return api.model(name)

    @app.get(
        "/healthz",
        responses={503: {"model": HealthAnswer, "description": "No pictures are drawn."}},
        summary="Whether pictures are being drawn",
    )
    async def health(response: Response) -> HealthAnswer:
        return api.health(response)

    @app.get(
        "/metrics",
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
        response_class=Response,
        summary="Figures for Prometheus",
    )
    async def metrics() -> Response:
        return Response(api.worker.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    if api.settings.urls:

        @app.get("/v1/images/files/{name}", response_class=Response, include_in_schema=False)
        async def picture_file(name: str) -> Response:
            png = api.store.get(name)
            if png is None:
                raise ApiError(404, "no such picture, or no longer", code="picture_not_found")
            return Response(png, media_type="image/png")


def _add_error_forms(app: FastAPI, api: ImagesApi) -> None:
    """Every error in the API's own form; what was sent is not echoed."""

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def unrouted(request: Request, error: HTTPException) -> Response:
        headers = error.headers
        return ApiError(error.status_code, str(error.detail), headers=headers).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = [str(part) for part in first["loc"][1:]]
        if first["type"] == "json_invalid":
            return ApiError(400, "the body is not JSON", code="invalid_json").response()
        if where == ["model"] and first["type"] == "literal_error":
            return api.unknown_model(first["input"]).response()
        param = ".".join(where) or None
        code = "unknown_parameter" if first["type"] == "extra_forbidden" else "invalid_value"
        message = f"{param or 'the body'}: {first['msg']}"
        return ApiError(400, message, code=code, param=param).response()

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return ApiError(500, f"internal error: {type(error).__name__}").response()


async def _disconnected(request: Request) -> None:
    """Return when the client has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _with_token(openapi: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """The description of the API, saying which paths want the token."""

    def described() -> dict[str, Any]:
        document = openapi()
        schemes = document.setdefault("components", {}).setdefault("securitySchemes", {})
        schemes["token"] = {"type": "http", "scheme": "bearer"}
        for path, operations in document["paths"].items():
            for operation in operations.values():
                if not is_open(path):
                    operation["security"] = [{"token": []}]
                    operation["responses"]["401"] = _NO_TOKEN
        return document

    return described
