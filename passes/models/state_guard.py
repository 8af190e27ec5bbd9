"""Everything that code of a model may change is as before afterwards, bit for bit and by identity.

Flow: the state of the model's objects, its tensors and the process at entry → code runs: forwards, exports, checks → the state
is restored, whatever happened. What is kept and what is not: `object_state`, `tensor_state`, `process_state`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram

from memrewrite.errors import ModelError, in_one_line
from memrewrite.passes.models.object_state import reachable, restorers
from memrewrite.passes.models.process_state import Restorer, process_restorers
from memrewrite.passes.models.tensor_state import TensorState

log = logging.getLogger("memrewrite")


class StateGuard:
    """Context manager: on exit the model and the process are as they were on entry, also after an error of any class.

    `release` keeps the model as it is then; the random number generators and the switches of torch are restored in any case.
    """

    def __init__(self, model: nn.Module | ExportedProgram) -> None:
        self._model = model

    def __enter__(self) -> StateGuard:
        model = self._model
        roots = (model,) if isinstance(model, nn.Module) else (model.state_dict, model.constants)
        self._process = process_restorers()
        found = reachable(roots)
        self._objects = restorers(found)
        self._tensors: TensorState | None = TensorState(value for value in found if isinstance(value, Tensor))
        self._tensors.__enter__()  # type: ignore[no-untyped-call]
        self._mode = self._tensors
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._mode.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        tensors = self._tensors.restorers() if self._tensors is not None else []
        problems = _all_run([*self._objects, *tensors, *self._process])
        self.release()
        for problem in problems:
            log.error("a part of the model's state could not be restored: %s", in_one_line(problem), exc_info=problem)
        if problems and error is None:
            raise ModelError(
                f"the model's state could not be restored: {in_one_line(problems[0])}",
                where=type(self._model).__name__,
                hint="load the model again: a part of it may be changed",
            ) from problems[0]

    def release(self) -> None:
        """Keep the model as it is: its state is not restored on exit."""
        self._objects, self._tensors = [], None

    def changed(self, tensor: Tensor) -> bool:
        """Whether the bits of a tensor of the model are others than on entry."""
        return self._tensors is not None and self._tensors.changed(tensor)

    def apart(self, outputs: Any) -> Any:
        """Outputs of the model without memory in common with what will be restored."""
        return outputs if self._tensors is None else self._tensors.apart(outputs)


def _all_run(steps: Iterable[Restorer]) -> list[BaseException]:
    """Run every function, also after one that raises; returns what was raised."""
    return [problem for problem in map(_problem_of, steps) if problem is not None]


def _problem_of(step: Restorer) -> BaseException | None:
    try:
        step()
    except BaseException as problem:  # noqa: BLE001 - an interrupt, too, must not leave the rest changed
        return problem
    return None
