"""The progress of a training: a bar on a terminal, elsewhere a line every tenth step."""

import sys
import time
from collections import deque

from tfkern.extras import require
from tfkern.training.trainer import Training

EVERY = 10  # steps between lines
RECENT = 20  # steps over which the speed is averaged


class Steps:
    """Show the loss, the tokens a second and attention's share of the time. A context manager: call `show` after each step.
    quiet: show nothing."""

    def __init__(self, training: Training, quiet: bool = False):
        self.quiet, self.bar = quiet, None
        self.recent = deque([(time.perf_counter(), training.tokens)], maxlen=RECENT + 1)
        if sys.stdout.isatty() and not quiet:
            rich = require("rich.progress", "demo")
            columns = (
                rich.TextColumn("step {task.completed}/{task.total}"),
                rich.BarColumn(),
                rich.TextColumn("{task.description}"),
                rich.TimeRemainingColumn(),
            )
            self.bar = rich.Progress(*columns)
            self.task = self.bar.add_task("", total=training.steps, completed=len(training.losses))

    def __enter__(self) -> "Steps":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self.bar:
            self.bar.stop()

    def show(self, training: Training) -> None:
        self.recent.append((time.perf_counter(), training.tokens))
        done = len(training.losses)
        if self.bar:
            self.bar.update(self.task, completed=done, description=self.told(training))
        elif not self.quiet and (done % EVERY == 0 or done == training.steps):
            print(f"step {done:5} of {training.steps}  {self.told(training)}", flush=True)

    def told(self, training: Training) -> str:
        """The loss, the speed and attention's share in one line. Beside a bar it is shorter, so that both fit into 80
        columns."""
        (start, before), (end, after) = self.recent[0], self.recent[-1]
        text = f"loss {training.losses[-1]:.4f}  {(after - before) / (end - start):,.0f} tokens/s"
        if training.share is None:
            return text
        step, share = training.share
        return f"{text}  {share:.0%}{'' if self.bar else f' of step {step}'} in attention"
