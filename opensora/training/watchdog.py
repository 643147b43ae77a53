"""Keep steps with NaN or infinity out of the weights, and tell which samples caused them.

A bad step is not taken and its samples are written to `bad_steps.jsonl`. After several in a row the
weights themselves are suspect: the trainer goes back to the last good checkpoint.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from opensora.errors import NonFiniteError

_GRADIENT, _LOSS = 1, 2


class Verdict(Enum):
    """Say what to do with a step whose gradients are there."""

    OK = "ok"
    SKIP = "skip"
    REWIND = "rewind"


class Watchdog:
    """Judge every step before its weights change; all processes reach the same verdict.

    What the trainer does with the verdict:
        OK: takes the step.
        SKIP: drops the gradients and goes on with the next batch. Nothing else changes.
        REWIND: loads weights, averages and optimizer of the last good checkpoint, and goes on with
            the *next* batch: with the same batches it would come to the same end.
    Checkpoints are good only while `in_row` is 0: write none otherwise.

    Args:
        folder: of the run; gets `bad_steps.jsonl`, one object a bad step and process.
        patience: bad steps in a row after which to rewind.
        rewinds: how often to rewind in a run before giving up.
        agree: returns the largest of the numbers that the processes give; None for one process.
            Every process calls it once a step.
        rank: of this process.

    Attributes:
        in_row: bad steps since the last good one.
        rewound: rewinds so far.
        total: bad steps so far.
    """

    def __init__(
        self,
        folder: Path,
        *,
        patience: int = 5,
        rewinds: int = 3,
        agree: Callable[[int], int] | None = None,
        rank: int = 0,
    ) -> None:
        self.path = folder / "bad_steps.jsonl"
        self.patience, self.rewinds, self.rank = patience, rewinds, rank
        self._agree = agree or (lambda own: own)
        self.in_row = self.rewound = self.total = 0

    def check(
        self,
        loss: float | Sequence[float],
        grad_norm: float,
        batch_names: Sequence[str],
        step: int,
        *,
        extreme: bool = False,
        details: Mapping[str, Any] | None = None,
    ) -> Verdict:
        """Judge a step.

        Args:
            loss: of this process; of every micro-batch if there are several.
            grad_norm: of the whole model, before clipping.
            batch_names: of the samples this process had in the step.
            step: zero-based.
            extreme: clipping found the norm too far out (`Clipped.extreme`).
            details: JSON values for the log: batch number, bucket, timesteps.

        Raises:
            NonFiniteError: there was no rewind left; says what to type.
        """
        losses = [loss] if isinstance(loss, (int, float)) else list(loss)
        own = 0
        if extreme or not math.isfinite(grad_norm):
            own = _GRADIENT
        if not all(math.isfinite(value) for value in losses):
            own = _LOSS
        worst = self._agree(own)
        if worst == 0:
            self.in_row = 0
            return Verdict.OK
        self.in_row += 1
        self.total += 1
        # A loss that is not finite names its process; a gradient may be anyone's.
        if own == worst:
            self._write(step, losses, grad_norm, batch_names, details or {})
        if self.in_row < self.patience:
            self._tell(f"step {step}: {_words(losses, grad_norm)}; skipped, see {self.path}")
            return Verdict.SKIP
        if self.rewound >= self.rewinds:
            raise NonFiniteError(
                f"{self.in_row} steps in a row, up to step {step}, had "
                f"{_words(losses, grad_norm)}, after {self.rewound} returns to a checkpoint. The "
                f"samples are in {self.path}: take them out of the table if they are bad, else go "
                "on from the last checkpoint "
                "with --load latest and half the --lr, or with --dtype fp32"
            )
        self.in_row = 0
        self.rewound += 1
        self._tell(
            f"step {step}: {self.patience} bad steps in a row; back to the last good checkpoint "
            f"({self.rewound} of at most {self.rewinds} times)"
        )
        return Verdict.REWIND

    def state_dict(self) -> dict[str, int]:
        """Return the counters."""
        return {"in_row": self.in_row, "rewound": self.rewound, "total": self.total}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Take back what `state_dict` returned; not after a rewind, which must count."""
        self.in_row, self.rewound = int(state["in_row"]), int(state["rewound"])
        self.total = int(state["total"])

    def _tell(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def _write(
        self,
        step: int,
        losses: Sequence[float],
        grad_norm: float,
        names: Sequence[str],
        details: Mapping[str, Any],
    ) -> None:
        line = {
            "step": step,
            "rank": self.rank,
            "loss": [str(v) if not math.isfinite(v) else v for v in losses],
            "grad_norm": grad_norm if math.isfinite(grad_norm) else str(grad_norm),
            "samples": list(names),
            **details,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # One write to the end of the file: lines of several processes do not mix.
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, default=str) + "\n")


def _words(losses: Sequence[float], grad_norm: float) -> str:
    bad = [value for value in losses if not math.isfinite(value)]
    if bad:
        return f"a loss of {bad[0]}"
    if not math.isfinite(grad_norm):
        return f"a gradient norm of {grad_norm}"
    return f"a gradient norm of {grad_norm:.3g}, far out of the usual, or another process had worse"


def starting_note(loss: float, *, pretrained: bool, blank: float = 2.0) -> str:
    """Say what the first loss of a run tells about the weights that it starts from.

    Args:
        loss: mean over the first steps, of rectified flow on latents of unit variance.
        pretrained: the run was told to start from trained weights.
        blank: loss of a model that returns zeros: the variance of the latents plus that of the
            noise, 2. A trained model is at 0.4 to 0.5, random weights of a large one at 4 to 5.
    """
    facts = f"first loss {loss:.3g}; returning zeros would give {blank:.3g}"
    if not math.isfinite(loss):
        return f"{facts}: weights or data hold NaN or infinity"
    if pretrained and loss > 0.6 * blank:
        return (
            f"{facts}: these weights are as good as random on this data (trained ones have 0.4 to "
            "0.5). Check the checkpoint's path, the VAE it was trained with and its scale"
        )
    if not pretrained and loss < 0.4 * blank:
        return f"{facts}: too good for random weights; were some loaded, or is the data blank?"
    return f"{facts}: as expected of {'trained' if pretrained else 'random'} weights"
