"""The checkpoints of one training stage: which there are, which is whole, which are kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from nemo_selfpref.checkpoint.folders import (
    CHECKPOINTS,
    DAMAGED,
    LATEST,
    STEP,
    checkpoints_of,
    folders_of,
    superfluous,
)
from nemo_selfpref.checkpoint.saver import (
    SavePolicy,
    Saver,
    problems_together,
)
from nemo_selfpref.config.schema import CheckpointParams, DamagedCheckpoint
from nemo_selfpref.errors import CheckpointError
from nemo_selfpref.files import remove_folder, write_text
from nemo_selfpref.megatron.parallel import all_gather_json, barrier, world_group


class StageCheckpoints:
    """STAGE/checkpoints: step-000010, step-000020, ... and `latest`, which names the newest.

    Every rank calls every method in step.
    """

    def __init__(
        self,
        stage: Path,
        params: CheckpointParams,
        device: torch.device,
        say: Callable[[str], None],
    ) -> None:
        self.stage, self._params, self._device, self._say = stage, params, device, say
        policy = SavePolicy(params.async_save, params.failed_saves_allowed)
        self.saver = Saver(device, policy, say, self._published)

    def path(self, step: int) -> Path:
        return self.stage / CHECKPOINTS / f"{STEP}{step:06d}"

    def newest(self) -> Path | None:
        """The newest checkpoint that is whole, every file's sum compared; what is damaged is put
        aside, or refused, as on_damaged says.

        Raises:
            CheckpointError: it is damaged and may not be passed over.
        """
        if self._is_main:
            self._tidy()
        names = [path.name for path in folders_of(self.stage)]
        for name in reversed(all_gather_json(names, world_group(), self._device)[0]):
            path = self.stage / CHECKPOINTS / name
            wrong = problems_together(path, self._device)
            if not wrong:
                return path
            self._put_aside(path, wrong)
        return None

    def _put_aside(self, path: Path, wrong: list[str]) -> None:
        text = "\n  ".join(wrong[:5] + ([f"and {len(wrong) - 5} more"] if len(wrong) > 5 else []))
        if self._params.on_damaged is DamagedCheckpoint.refuse:
            raise CheckpointError(
                f"{path} is not what was saved:\n  {text}\nGive the files back, or set exp_manager."
                "checkpoint_callback_params.on_damaged=previous to go on from an earlier one."
            )
        aside = path.with_name(f"{DAMAGED}{path.name}")
        barrier()
        if self._is_main:
            if aside.exists():
                remove_folder(aside)
            path.rename(aside)
        barrier()
        self._say(f"{path} is damaged and was put aside as {aside.name}:\n  {text}")

    def _tidy(self) -> None:
        """Delete what an interrupted save or deletion left."""
        for kind in ("tmp", "removed", "old"):
            for left in (self.stage / CHECKPOINTS).glob(f".{STEP}*.{kind}"):
                remove_folder(left)
        for left in (self.stage / CHECKPOINTS).glob(f".{LATEST}.*.tmp"):
            left.unlink(missing_ok=True)

    def _published(self, target: Path) -> None:
        """On the first rank, when a checkpoint has its name."""
        write_text(target.with_name(LATEST), f"{target.name}\n")
        for path in superfluous(checkpoints_of(self.stage), self._params):
            remove_folder(path)

    @property
    def _is_main(self) -> bool:
        return world_group().rank() == 0
