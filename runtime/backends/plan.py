"""A built plan as it lies on disk: the engine's bytes, its manifest, and the state that a trajectory begins from. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from modiff_trt.core.config import Config, stored_config
from modiff_trt.core.errors import InputError
from modiff_trt.core.files import digest_of, load_arrays, read_file, read_signed
from modiff_trt.core.manifest import PLAN_SCHEMA, START_KIND, START_SCHEMA, PlanManifest, check_manifest
from modiff_trt.core.rows import RowTable, rows_of_manifest


@dataclass(frozen=True)
class Plan:
    """`data` for TensorRT, `manifest` as the builder wrote it, and `start` [C, H, W] by input name, of the state's type."""

    path: Path
    data: bytes
    manifest: PlanManifest
    start: dict[str, np.ndarray[Any, Any]]
    config: Config

    @property
    def calibrated_rows(self) -> RowTable | None:
        """The row table of the network; None for a float network, which takes any timesteps."""
        return rows_of_manifest(self.manifest["network"])

    @property
    def batches(self) -> tuple[int, int]:
        """The smallest and largest batch of the optimization profile."""
        options = self.manifest["options"]
        return int(options["min_batch"]), int(options["max_batch"])

    @property
    def tokens(self) -> int:
        """Of the prompts that it was built for; of no meaning where its network has none."""
        return int(self.manifest["options"]["tokens"])


def load_plan(path: Path) -> Plan:
    """Reads what `modiff-trt build` wrote. Raises InputError if a part is missing or belongs to another plan."""
    if not path.is_file():
        raise InputError(f"plan {path} does not exist; build one with `modiff-trt build`")
    manifest = read_signed(path.with_suffix(".json"), "plan manifest", "build the plan again")
    if manifest.get("schema") != PLAN_SCHEMA:
        raise InputError(f"{path.with_suffix('.json')} is not a plan manifest of schema {PLAN_SCHEMA}; build the plan again")
    data = read_file(path, "plan")
    header, start, start_sha256 = load_arrays(path.with_suffix(".start.safetensors"), START_KIND, START_SCHEMA)
    try:
        config = stored_config(manifest["network"]["config"], str(path))
        check_manifest(manifest["network"], f"the manifest of {path}")
        if digest_of(data) != manifest["plan_sha256"]:
            raise InputError(f"{path} is not the plan that its manifest describes (truncated or altered?); build it again")
        if header["onnx_sha256"] != manifest["onnx_sha256"] or start_sha256 != manifest["start_sha256"]:
            raise InputError(f"the start state beside {path} belongs to another network; build the plan again")
        plan = Plan(path, data, cast(PlanManifest, manifest), start=start, config=config)
        _ = plan.calibrated_rows, plan.batches, plan.tokens
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(f"the manifest of {path} is damaged; build the plan again") from None
    return plan
