"""Options of several commands: the same flag means the same in every one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..completion import bundle_folders, runtime_names

Checkpoint = Annotated[
    str,
    typer.Option(
        "--ckpt",
        help='Student: .safetensors file, diffusers folder, hub id; "demo": the one that ships.',
    ),
]
Base = Annotated[
    str | None,
    typer.Option("--base", help="Pipeline folder or hub id for what the checkpoint lacks."),
]
Vae = Annotated[
    str | None,
    typer.Option("--vae", help="Folder of another VAE, such as TAESD; tiny:FOLDER insists on one."),
]
BundleArgument = Annotated[
    Path,
    typer.Argument(help="Bundle folder.", show_default=False, autocompletion=bundle_folders),
]
Method = Annotated[
    str,
    typer.Option(
        "--method", help="tiue: a distilled student; faster: any SD 1.x/2.x, Faster Diffusion."
    ),
]
SchedulerName = Annotated[
    str | None,
    typer.Option("--scheduler", help="faster: ddim, dpmpp or pndm \\[default: ddim]."),
]
KeySteps = Annotated[
    str | None,
    typer.Option(
        "--key-steps",
        help="faster: steps that run the encoder: nonuniform, uniform:N, 0,1,2,... or auto.",
    ),
]
Inject = Annotated[
    str | None,
    typer.Option(
        "--inject", help="faster: prior noise: off, on, parallel, sequential \\[default: on]."
    ),
]
Guidance = Annotated[
    float | None,
    typer.Option("--guidance", help="faster: scale, 1 is none \\[default: the bundle's, 7.5]."),
]
DecoderRows = Annotated[
    int | None,
    typer.Option("--max-decoder-rows", help="faster: rows of one decoder run; less memory."),
]
Budget = Annotated[
    float | None,
    typer.Option("--budget", help="auto: share of plain sampling's operations, such as 0.7."),
]
ControlNet = Annotated[
    str | None,
    typer.Option("--controlnet", help="faster: diffusers folder of a ControlNet to steer by."),
]
Lora = Annotated[
    list[str] | None,
    typer.Option("--lora", help="FILE[:SCALE] to merge first, diffusers or kohya; repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
LowMemory = Annotated[
    bool,
    typer.Option(
        "--low-memory",
        "--low-vram",
        help="Give memory back between operations (trt: one graph at a time); slower.",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace existing output.")]
RuntimeName = Annotated[
    str,
    typer.Option(
        "--runtime",
        help="ort, openvino, trt, torch (needs --ckpt) or fake.",
        autocompletion=runtime_names,
    ),
]
RuntimeOrAuto = Annotated[
    str,
    typer.Option(
        "--runtime",
        help="ort, openvino, trt, torch (needs --ckpt), fake, or auto: the fastest here, measured "
        "once and remembered.",
        autocompletion=runtime_names,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device", help="auto, cpu, cuda; with openvino gpu, npu; with coreml gpu, ane, evaluator."
    ),
]
Provider = Annotated[
    str | None,
    typer.Option(
        "--provider", help="With ort: cpu, cuda or rtx (plug-in) \\[default: by --device]."
    ),
]
CudaGraph = Annotated[
    bool | None,
    typer.Option(
        "--cuda-graph/--no-cuda-graph",
        help="All in one launch on a GPU \\[default: trt yes, if it can be; ort no].",
    ),
]
RuntimePrecision = Annotated[
    str,
    typer.Option(
        "--precision", help="auto, fp32, bf16 or fp16, for runtimes that can choose (openvino)."
    ),
]
Threads = Annotated[
    int | None, typer.Option("--threads", help="CPU threads \\[default: the runtime's choice].")
]
Height = Annotated[int | None, typer.Option("--height", help="Pixels.")]
Width = Annotated[int | None, typer.Option("--width", help="Pixels.")]
Steps = Annotated[
    int | None,
    typer.Option("--steps", help="K \\[default: what the checkpoint records, else 4]."),
]
Family = Annotated[
    str | None,
    typer.Option("--family", help="sd15, sd21-base, sd21-v, tiny \\[default: recognised]."),
]
HoistInto = Annotated[
    str,
    typer.Option("--hoist-into", help="Graph for the time-independent part: decoder, encoder."),
]
