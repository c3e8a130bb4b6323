"""What a run needs to go on, as one named object: saved after a step, restored by the next start."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ldm.config import ConfigError
from ldm.training.ema import Ema
from ldm.training.guards import UpdateGuard
from ldm.training.run_dir import DamagedState, RunDir, State, read_state
from ldm.training.sharding import own_part, whole


class Stateful(Protocol):
    """A network, an optimiser, or anything else that can be saved and restored."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any, /) -> Any: ...


class Checkpoint:
    """Raw weights and optimisers by name, the average and the guard of one run. The main process writes.

    With `snapshots` every state leaves its averaged weights behind, for `post_hoc_ema`.
    """

    def __init__(
        self,
        run: RunDir,
        accelerator: Accelerator,
        keep: int,
        ema: Ema,
        guard: UpdateGuard,
        parts: Mapping[str, Stateful],
        snapshots: bool = False,
    ) -> None:
        self.run, self.accelerator, self.keep = run, accelerator, keep
        self.ema, self.guard, self.parts, self.snapshots = ema, guard, parts, snapshots

    def resume(self) -> int:
        """Restores the newest intact state and returns its step, 0 where there is none; every process must call it.

        Raises:
            ConfigError: a process cannot read the state that the main one found.
        """
        found = self.run.load_newest(print) if self.accelerator.is_main_process else None
        steps = [None if found is None else found[0]]
        broadcast_object_list(steps)
        if steps[0] is None:
            return 0
        self._restore(self._read(steps[0]) if found is None else found[1])
        if self.snapshots and found is not None and not self.run.drop_averages(steps[0]):
            self._keep_average(steps[0], found[1], print)
        self.accelerator.print(f"resuming {self.run.folder} at step {steps[0]}")
        return steps[0]

    def save(self, step: int, say: Callable[[str], object]) -> None:
        """Saves the state after `step` steps; every process must call it.

        A disk that is full or fails costs this state only: it is told through `say`, and training goes on.
        """
        self.accelerator.wait_for_everyone()
        state = whole(self._state(step), self.accelerator.is_main_process)
        if self.accelerator.is_main_process:
            try:
                self.run.save(step, state, self.keep)
            except OSError as error:
                last = self.run.newest_intact()
                say(f"step {step}: warning: no state was saved ({error}); the last good one is {last}")
            if self.snapshots:
                self._keep_average(step, state, say)
        self.accelerator.wait_for_everyone()

    def _keep_average(self, step: int, state: State, say: Callable[[str], object]) -> None:
        try:
            self.run.keep_average(step, {name: state[name] for name in ("ema", "progress")})
        except OSError as error:
            say(f"step {step}: warning: the averaged weights were not kept in {self.run.averages} ({error})")

    def _state(self, step: int) -> State:
        progress = {
            "step": step,
            "ema_updates": self.ema.updates,
            "ema_decay": self.ema.decay,
            "guard": self.guard.state_dict(),
        }
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        return {**parts, "ema": self.ema.state_dict(), "progress": progress}

    def _restore(self, state: State) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(own_part(state[name], part))
        progress = state["progress"]
        self.ema.load_state_dict(state["ema"], progress["ema_updates"])
        self.guard.load_state_dict(progress.get("guard", {}))

    def _read(self, step: int) -> State:
        try:
            return read_state(self.run.state(step))
        except DamagedState as error:
            rank = self.accelerator.process_index
            raise ConfigError(
                f"process {rank} cannot read the state that process 0 resumes from ({error}); `output_dir` must lie on "
                "a file system that all hosts share"
            ) from error
