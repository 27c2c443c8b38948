"""What modes chosen by measurement are worth: PSNR to FP32 beside full modulation, and FD-CIFAR beside floating point.

    python -m modiff_trt.tools.research.modes_study --config configs/cifar10.yml --ckpt FILE --scales all.safetensors \\
        --auto-scales auto.safetensors --reference IMAGES --device cuda --out results/modes_study.json

Both scales files are of the same steps. The file is written after every figure; the same command goes on from there.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from modiff_trt.core.scales import Scales, load_scales
from modiff_trt.networks.state_elements import state_elements
from modiff_trt.runtime.images.folders import rounded_psnr
from modiff_trt.tools.research.refusals import refuses_bad_input
from modiff_trt.tools.research.solver_study import FLOAT, SolverStudy


@refuses_bad_input
def main(
    config: Annotated[Path, typer.Option(help="DDIM configuration (.yml)")],
    ckpt: Annotated[Path, typer.Option(help="trained weights")],
    scales: Annotated[Path, typer.Option(help="scales file with every layer modulated that can be")],
    auto_scales: Annotated[Path, typer.Option(help="scales of `calibrate --modes auto`, from the same trajectories")],
    reference: Annotated[Path, typer.Option(help="images, or statistics that `evaluate` left in its cache (.safetensors)")],
    out: Annotated[Path, typer.Option(help="JSON file to write")],
    images: Annotated[int, typer.Option(help="images of PSNR")] = 512,
    fd_images: Annotated[int, typer.Option(help="images of FD-CIFAR")] = 50000,
    batch_size: Annotated[int, typer.Option(help="images in one pass")] = 256,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    seconds: Annotated[float, typer.Option(help="begin no new figure after this long")] = 1e9,
) -> None:
    """Compares modes chosen by measurement with full modulation and with floating point."""
    study = SolverStudy(
        config,
        ckpt,
        images=images,
        fd_images=fd_images,
        whole_images=fd_images,
        truth_steps=1000,
        batch_size=batch_size,
        device=device,
        out=out,
        deadline=seconds,
    )
    chosen = {
        name: load_scales(path, study.network, study.checkpoint.sha256)
        for name, path in (("native-modiff", scales), ("native-auto", auto_scales))
    }
    solver, passes = chosen["native-auto"].solver, len(chosen["native-auto"].rows.timesteps)
    indices = range(images)

    def nearness(of: Scales) -> dict[str, Any]:
        exact = study.exact(solver, passes, indices)
        found = study.images(study.native_denoiser(of), solver, indices)[0]
        size = 2 * sum(state_elements(of, study.network).values())
        return {"psnr_db": rounded_psnr(found, exact, 3), "layers_with_state": len(of.modulated), "state_bytes_an_image": size}

    for name, of in chosen.items():
        study.record("psnr", name, partial(nearness, of))
    if study.time_is_up:
        return
    judge = study.judge(reference)
    lines = {
        FLOAT: partial(study.floating, solver, passes),
        "native-auto": partial(study.native_denoiser, chosen["native-auto"]),
    }
    for name, make in lines.items():
        study.record("fd", name, partial(study.measured, make, solver, judge, count=fd_images))


if __name__ == "__main__":
    typer.run(main)
