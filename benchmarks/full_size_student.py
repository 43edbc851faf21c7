"""Make a full-size student with seeded random weights: fp16 pipeline folder and LDM-layout file.

    python -m tiue_export.benchmarks.full_size_student OUT --family sd21-base

The two hold the same weights, so bundles exported from them must be identical. 2.6 + 1.7 GB.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from tiue_export.synthetic import write_ldm_file, write_synthetic_pipeline


def main() -> None:
    """Write OUT/pipeline and OUT/student-ldm.safetensors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--family", default="sd21-base", choices=("sd15", "sd21-base", "sd21-v"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    pipeline = arguments.out / "pipeline"
    write_synthetic_pipeline(pipeline, arguments.family, seed=arguments.seed, dtype=torch.float16)
    print(pipeline)
    print(write_ldm_file(pipeline, arguments.out / "student-ldm.safetensors"))


if __name__ == "__main__":
    main()
