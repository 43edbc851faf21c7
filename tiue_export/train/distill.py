"""Configuration -> trained student folder: one run of the reference path, resumable."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from tiue_export.errors import UsageError
from tiue_export.student.pipeline_folder import write_pipeline
from tiue_export.system.disk_errors import disk_errors

from .clip_term import clip_sha256
from .config import DistillConfig
from .consistency import ConsistencyDistillation
from .cpu_precision import has_native_bf16
from .loop import train
from .networks import Networks, load_networks
from .prompts import read_prompts
from .run_folder import CONFIG_FILE, STATE_FILE, RunFolder
from .sample_grid import draw_grid, save_grid
from .score_distillation import ScoreDistillation

_MIXED = {"fp32": "no", "fp16": "fp16", "bf16": "bf16"}


def distill(config: DistillConfig, on_stage: Callable[[str], None] = lambda stage: None) -> Path:
    """Train, or go on training, in `config.out`; returns the student's pipeline folder.

    Below `config.out`: run.json (what decides the outcome), state.pt (the last save, replaced
    atomically), journal.jsonl, tensorboard/, samples/step-N.png and student/, the averaged student
    as every command accepts it. Run under `accelerate launch` it uses all processes given; they
    must see the same files.

    Raises `UsageError`, `CheckpointError`, `UnsupportedModelError` for what cannot be trained,
    `RuntimeFailure` when a loss is not finite and `ResourceError` when the disk is full.
    """
    out = Path(config.out)
    with _accelerator(config) as accelerator:
        writes = accelerator.is_main_process
        if writes and config.precision == "bf16" and accelerator.device.type == "cpu":
            if not has_native_bf16():
                on_stage(
                    'this CPU has no bf16 instructions: precision = "fp32" is many times faster'
                )
        if writes:
            on_stage("reading prompts")
        prompts = read_prompts(Path(config.prompts), config.prompt_column)
        if writes:
            on_stage("loading the teacher")
        networks = load_networks(config, accelerator.device)
        if writes:
            height, width = networks.size_px
            if networks.fresh_tensors:
                on_stage(
                    f"{networks.fresh_tensors} tensors of backbone {config.backbone} have another "
                    "shape in the teacher and start at random"
                )
            on_stage(f"training at {width}x{height} px")
        method = ScoreDistillation if config.has_fake_score else ConsistencyDistillation
        distillation = method(config, networks, prompts, accelerator)
        run = _open_run(config, prompts, networks, accelerator)
        distillation.prepare()
        shown = _SampleWriter(config, networks, prompts, distillation, out)
        try:
            train(
                run,
                distillation.parts,
                config.iterations,
                distillation.step,
                title=config.method,
                log_every=config.log_every,
                save_every=config.save_every,
                after_save=shown.after_save,
                on_log=shown.on_log,
                on_start=shown.on_start,
                writes=writes,
            )
        finally:
            shown.close()
    return out / "student"


@contextmanager
def _accelerator(config: DistillConfig) -> Iterator[Accelerator]:
    """Accelerate, for one training: its state is the process's, and the next may differ."""
    if config.precision == "fp16" and not torch.cuda.is_available():
        raise UsageError(
            "precision is fp16, which trains on GPUs only, and there is none here",
            'Set precision = "bf16" or "fp32".',
        )
    # Without being told, Accelerate lets each of several processes on CPUs train alone.
    cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(mixed_precision=_MIXED[config.precision], cpu=cpu)
    try:
        yield accelerator
        accelerator.wait_for_everyone()
        accelerator.end_training()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def _open_run(
    config: DistillConfig, prompts: Sequence[str], networks: Networks, accelerator: Accelerator
) -> RunFolder:
    """The main process makes or checks the folder first; the others then find it there."""
    out = Path(config.out)
    height, width = networks.size_px
    settings = {
        **config.outcome,
        "height": height,
        "width": width,
        "prompts_sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "scheduler": networks.student.scheduler_config,
    }
    for name, digest in (networks.sha256 | clip_sha256(config)).items():
        settings[f"{name}_sha256"] = digest
    if (out / "student").exists() and not (out / CONFIG_FILE).exists():
        raise UsageError(
            f"{out} has a student/ that no training made, and this one would replace it",
            "Choose another output folder.",
        )
    with accelerator.main_process_first():
        run = RunFolder(out, settings)
    _check_shared(run, accelerator)
    return run


def _check_shared(run: RunFolder, accelerator: Accelerator) -> None:
    """All processes must resume from the same state, wherever they run."""
    file = run.path / STATE_FILE
    stamp = file.stat().st_mtime_ns if file.is_file() else 0
    stamps = accelerator.gather(torch.tensor([stamp], device=accelerator.device))
    if len(stamps.unique()) > 1:
        raise UsageError(
            f"the processes see different states in {run.path}",
            "Choose an output folder that all machines share.",
        )


class _SampleWriter:
    """What a person looks at while it trains: TensorBoard, sample grids, the student itself."""

    def __init__(
        self,
        config: DistillConfig,
        networks: Networks,
        prompts: Sequence[str],
        distillation: ScoreDistillation | ConsistencyDistillation,
        out: Path,
    ) -> None:
        self._config, self._networks, self._distillation = config, networks, distillation
        self._prompts = list(config.sample_prompts or prompts[:4])
        self._out = out
        self._board: Any = None

    def on_start(self, done: int) -> None:
        """Open the curves; what a killed run drew beyond its last save is taken back."""
        from torch.utils.tensorboard import SummaryWriter

        with disk_errors(self._out / "tensorboard"):
            self._board = SummaryWriter(str(self._out / "tensorboard"), purge_step=done + 1)

    def on_log(self, step: int, figures: Mapping[str, float]) -> None:
        """One point of every curve."""
        for name, value in figures.items():
            self._board.add_scalar(name, value, step)

    def after_save(self, step: int) -> None:
        """The averaged student as a folder, and its pictures every `sample_every` steps."""
        config, networks = self._config, self._networks
        parameters = list(networks.student.parameters())
        average = self._distillation.average.weights
        average.store(parameters)
        try:
            average.copy_to(parameters)
            write_pipeline(
                self._out / "student",
                unet=networks.student.unet,
                text_encoder=networks.text_encoder,
                vae=networks.vae,
                tokenizer=networks.tokenizer_folder,
                scheduler_config=networks.student.scheduler_config,
                # An LCM draws in any number of steps, and is known by its scheduler.
                steps=config.steps if config.has_fake_score else None,
                fan_out=networks.student.plan.fan_out,
                force=True,
            )
            if step % config.sample_every == 0 or step == config.iterations:
                grid = draw_grid(
                    networks,
                    self._distillation.sample,
                    self._prompts,
                    config.samples_per_prompt,
                    config.micro_batch,
                )
                with disk_errors(self._out / "samples"):
                    save_grid(grid, self._prompts, self._out / "samples" / f"step-{step:06d}.png")
                self._board.add_images("samples", grid.flatten(0, 1), step, dataformats="NHWC")
        finally:
            average.restore(parameters)

    def close(self) -> None:
        """Flush the curves."""
        if self._board is not None:
            self._board.close()
