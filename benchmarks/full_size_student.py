"""Make a full-size student with seeded random weights: fp16 pipeline folder and LDM-layout file.

    python -m tiue_export.benchmarks.full_size_student OUT --family sd21-base
    python -m tiue_export.benchmarks.full_size_student OUT --teacher

The two hold the same weights, so bundles exported from them must be identical. 2.6 + 1.7 GB,
of SDXL 6.9 + 5.1 GB.
--teacher writes the folder's weights again as OUT/teacher, which records no K: an ordinary model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .synthetic import write_ldm_file, write_synthetic_pipeline

_FAMILIES = ("sd15", "sd21-base", "sd21-v", "sdxl", "ssd-1b", "vega")


def main() -> None:
    """Write OUT/pipeline and OUT/student-ldm.safetensors, or OUT/teacher."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--family", default="sd21-base", choices=_FAMILIES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--teacher", action="store_true", help="the same weights as an ordinary model, without K"
    )
    asked = parser.parse_args()
    if asked.teacher:
        teacher = asked.out / "teacher"
        print(
            write_synthetic_pipeline(
                teacher, asked.family, seed=asked.seed, dtype=torch.float16, steps=None
            )
        )
        return
    pipeline = asked.out / "pipeline"
    print(write_synthetic_pipeline(pipeline, asked.family, seed=asked.seed, dtype=torch.float16))
    print(write_ldm_file(pipeline, asked.out / "student-ldm.safetensors"))


if __name__ == "__main__":
    main()
