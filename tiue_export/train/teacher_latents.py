"""Pictures to learn on: latents that the teacher draws once, kept in the run.

For a consistency student the paper noises latents of photographs; a run here has prompts alone, so
the teacher draws them, by the very steps that the student is then trained to skip. Regression needs
the noise too that each was drawn from.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from tiue_export.errors import CheckpointError, first_line
from tiue_export.system.atomic_file import write_atomically
from tiue_export.system.disk_errors import disk_errors

from .config import DistillConfig
from .consistency_losses import Solver
from .loop import Reporter
from .networks import Networks
from .score_networks import guided_score

FOLDER = "teacher-latents"
# Pictures of one file: what is lost at most when a run is killed.
_FILE = 64
_STREAM = 1  # of the seed; epochs and steps have theirs


def teacher_latents(
    config: DistillConfig,
    networks: Networks,
    prompts: Sequence[str],
    accelerator: Accelerator,
) -> Tensor:
    """Latents (config.teacher_pictures, 4, h, w) float16; picture i shows prompts[i % P].

    What is missing below `config.out` is drawn first, each file by one of the processes. Raises
    `CheckpointError` for a damaged file.
    """
    folder = Path(config.out) / FOLDER
    firsts = range(0, config.teacher_pictures, _FILE)
    own = [
        first
        for first in firsts[accelerator.process_index :: accelerator.num_processes]
        if not _file(folder, first).is_file()
    ]
    if own:
        null = networks.embed([""])  # (1, L, D)
        visible = accelerator.is_main_process
        with Reporter("teacher's pictures", 0, len(own) * _FILE, visible=visible) as report:
            for done, first in enumerate(own, 1):
                count = min(_FILE, config.teacher_pictures - first)
                shown = [prompts[(first + place) % len(prompts)] for place in range(count)]
                latents = _draw(config, networks, accelerator, shown, null, first)
                file = _file(folder, first)
                with disk_errors(file):
                    folder.mkdir(exist_ok=True)
                    write_atomically(file, save({"latents": latents.half().cpu().contiguous()}))
                report(done * _FILE, {})
    accelerator.wait_for_everyone()
    return torch.cat([_read(_file(folder, first)) for first in firsts])


def starting_noise(
    config: DistillConfig, latent_shape: tuple[int, ...], indices: Sequence[int]
) -> Tensor:
    """The noise that the teacher drew pictures `indices` from, (len(indices), 4, h, w) float32."""
    return torch.stack(
        [_file_noise(config, latent_shape, index // _FILE)[index % _FILE] for index in indices]
    )


# One is 64 noises: 4 MB at 64x64 latents.
@lru_cache(maxsize=64)
def _file_noise(config: DistillConfig, latent_shape: tuple[int, ...], number: int) -> Tensor:
    first = number * _FILE
    count = min(_FILE, config.teacher_pictures - first)
    generator = np.random.default_rng([config.seed, _STREAM, first])
    return torch.from_numpy(generator.standard_normal((count, *latent_shape), np.float32))


def _file(folder: Path, first: int) -> Path:
    return folder / f"{first:07d}.safetensors"


@torch.no_grad()
def _draw(
    config: DistillConfig,
    networks: Networks,
    accelerator: Accelerator,
    prompts: Sequence[str],
    null: Tensor,
    first: int,
) -> Tensor:
    """(len(prompts), 4, h, w) float32, at most `micro_batch` of them at a time."""
    noise = _file_noise(config, networks.latent_shape, first // _FILE)
    solver = Solver.over(networks.alphas, config.solver_steps)
    drawn = []
    for start in range(0, len(prompts), config.micro_batch):
        text = networks.embed(prompts[start : start + config.micro_batch])  # (B, L, D)
        sample = noise[start : start + config.micro_batch].to(networks.alphas.device)
        for index in reversed(range(config.solver_steps)):
            indices = torch.full((len(sample),), index, device=sample.device)
            timesteps = solver.timesteps[indices]
            with accelerator.autocast():
                predicted = guided_score(
                    networks.teacher, sample, timesteps, text, null, config.guidance
                )
            sample = solver.step(sample, predicted, indices)
        drawn.append(sample)
    return torch.cat(drawn)


def _read(file: Path) -> Tensor:
    try:
        latents: Tensor = load(file.read_bytes())["latents"]
    except (OSError, SafetensorError, KeyError) as error:
        raise CheckpointError(
            f"{file} does not hold the teacher's latents: {first_line(error)}",
            f"Remove {file}; the same command draws it again.",
        ) from error
    return latents
