"""A callback of the Trainer of transformers: it logs which slots are read. `memrewrite.UsageCallback` imports it when used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from memrewrite.errors import UserError
from memrewrite.usage.watch import Usage

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise UserError("UsageCallback needs transformers", hint="pip install 'memrewrite[hf]'") from error


class UsageCallback(TrainerCallback):
    """Logs, every `every` optimizer steps, how the memory of the model was read since the last time.

    ```python
    trainer = Trainer(model, args, train_dataset=data)
    trainer.add_callback(memrewrite.UsageCallback(trainer.log, every=100))
    ```

    The names are those of `Usage.scalars`, such as "memory/model.layers.2.mlp/share_read"; TensorBoard shows them below
    "train/". Only training steps are counted, evaluation is not. With several processes their counts are added.

    Args:
        log: Receives the numbers: `trainer.log`, which passes them to all that the Trainer reports to (TensorBoard, the
            console, `trainer.state.log_history`); or another function of a dict.
        every: Optimizer steps between two reports.

    Attributes:
        usage: The counts since the last report; None before training.

    Raises:
        UserError: `every` is below 1; at its first use, transformers is not installed.
    """

    def __init__(self, log: Callable[[dict[str, float]], Any], *, every: int = 100) -> None:
        if every < 1:
            raise UserError(f"every={every!r}: a report needs at least one step", hint="every=100")
        self.log, self.every = log, every
        self.usage: Usage | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the layers. Raises `ModelError` for a model without memory layers."""
        if self.usage is not None:
            self.usage.stop()  # an earlier training ended with an error
        self.usage = Usage(kwargs["model"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the forwards of this step."""
        if self.usage is not None:
            self.usage.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop counting; report every `every` steps."""
        if self.usage is None:
            return
        self.usage.stop()
        if state.global_step % self.every == 0:
            self._report(control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop counting, also after an incomplete step."""
        if self.usage is not None:
            self.usage.stop()

    def _report(self, control: Any) -> None:
        if self.usage is None:
            return
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self.usage.all_reduce()
        scalars = self.usage.scalars()
        self.usage.reset()
        due = control.should_log
        self.log(scalars)
        control.should_log = due  # the Trainer takes any log for the one that is due, and would omit the loss
