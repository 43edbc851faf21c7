"""Configuration -> trained student folder: one run of the reference path, resumable."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from tiue_export.bundle import disk_errors
from tiue_export.errors import UsageError
from tiue_export.pipeline_folder import write_pipeline

from .config import DistillConfig
from .distillation import Distillation
from .loop import train
from .networks import Networks, load_networks
from .prompts import read_prompts
from .run_folder import RunFolder
from .sample_grid import draw_grid, save_grid

_MIXED = {"fp32": "no", "fp16": "fp16", "bf16": "bf16"}


def distill(config: DistillConfig, on_stage: Callable[[str], None] = lambda stage: None) -> Path:
    """Train, or go on training, in `config.out`; returns the student's pipeline folder.

    Below `config.out`: run.json (what decides the outcome), state.pt (the last save, replaced
    atomically), journal.jsonl, tensorboard/, samples/step-N.png and student/, the averaged student
    as every command accepts it. Run under `accelerate launch` it uses all processes given.

    Raises `UsageError`, `CheckpointError`, `UnsupportedModelError` for what cannot be trained and
    `RuntimeFailure` when a loss is not finite.
    """
    out = Path(config.out)
    on_stage("reading prompts")
    prompts = read_prompts(Path(config.prompts), config.prompt_column)
    accelerator = _accelerator(config)
    on_stage("loading the teacher")
    networks = load_networks(config, accelerator.device)
    run = _open_run(config, prompts, accelerator)
    distillation = Distillation(config, networks, prompts, accelerator)
    shown = _SampleWriter(config, networks, prompts, distillation, out)
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
        writes=accelerator.is_main_process,
    )
    shown.close()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return out / "student"


def _accelerator(config: DistillConfig) -> Accelerator:
    if config.precision == "fp16" and not torch.cuda.is_available():
        raise UsageError(
            "precision is fp16, which trains on GPUs only, and there is none here",
            'Set precision = "bf16" or "fp32".',
        )
    return Accelerator(mixed_precision=_MIXED[config.precision])


def _open_run(config: DistillConfig, prompts: Sequence[str], accelerator: Accelerator) -> RunFolder:
    """The main process makes or checks the folder first; the others then find it there."""
    settings = {**config.outcome, "prompt_count": len(prompts)}
    with accelerator.main_process_first():
        return RunFolder(Path(config.out), settings)


class _SampleWriter:
    """What a person looks at while it trains: TensorBoard, sample grids, the student itself."""

    def __init__(
        self,
        config: DistillConfig,
        networks: Networks,
        prompts: Sequence[str],
        distillation: Distillation,
        out: Path,
    ) -> None:
        self._config, self._networks, self._distillation = config, networks, distillation
        self._prompts = list(config.sample_prompts or prompts[:4])
        self._out = out
        self._board: Any = None

    def on_log(self, step: int, figures: Mapping[str, float]) -> None:
        """One point of every curve."""
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self._out / "tensorboard"), purge_step=step)
        for name, value in figures.items():
            self._board.add_scalar(name, value, step)

    def after_save(self, step: int) -> None:
        """The averaged student as a folder, and its pictures every `sample_every` steps."""
        config, networks = self._config, self._networks
        parameters = list(networks.student.parameters())
        average = self._distillation.average
        average.store(parameters)
        average.copy_to(parameters)
        try:
            self._write_student()
            if step % config.sample_every == 0 or step == config.iterations:
                grid = draw_grid(networks, self._prompts, config.samples_per_prompt)
                with disk_errors(self._out / "samples"):
                    save_grid(grid, self._prompts, self._out / "samples" / f"step-{step:06d}.png")
                if self._board is not None:
                    pictures = grid.flatten(0, 1)
                    self._board.add_images("samples", pictures, step, dataformats="NHWC")
        finally:
            average.restore(parameters)

    def close(self) -> None:
        """Flush the curves."""
        if self._board is not None:
            self._board.close()

    def _write_student(self) -> None:
        networks = self._networks
        write_pipeline(
            self._out / "student",
            unet=networks.student.unet,
            text_encoder=networks.text_encoder,
            vae=networks.vae,
            tokenizer=networks.tokenizer_folder,
            scheduler_config=networks.student.scheduler_config,
            steps=self._config.steps,
            force=True,
        )


