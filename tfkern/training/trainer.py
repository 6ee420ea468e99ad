"""One training loop for every task, and checkpoints from which it goes on bit for bit."""

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from tfkern.ending import InputError
from tfkern.models.tokens import TokenizerError
from tfkern.training import checkpoints, kinds, opening
from tfkern.training.attention_share import Watch
from tfkern.training.checkpoints import CheckpointError
from tfkern.training.data import Source
from tfkern.training.distributed import Ranks, placed, whole
from tfkern.training.recipe import Recipe
from tfkern.training.tasks import Score, Task
from tfkern.training.trained import Form, read_form, refusing_others

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
ALONE = Ranks()
MEASURED_EVERY = 100  # steps; the first that is measured is the third


@dataclasses.dataclass
class Training:
    """A model under training: all that its next step depends on."""

    task: Task
    recipe: Recipe
    model: nn.Module
    runs: nn.Module  # what computes: the model, or what Ranks wraps around it
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    generator: torch.Generator  # of batches
    device: torch.device
    ranks: Ranks
    watch: Watch
    losses: list[float] = dataclasses.field(default_factory=list)
    tokens: int = 0  # read since the start or the resume, by all processes
    share: tuple[int, float] | None = None  # the last step whose share of time in attention was measured, and that share

    @classmethod
    def start(
        cls, task: Task, attention: Callable[..., Tensor], steps: int | None = None, seed: int = 0, device="cpu",
        ranks: Ranks = ALONE, prepare: Callable[[nn.Module], object] = lambda model: None,
    ):  # fmt: skip
        """A fresh one of `steps` steps (default: the task's own).

        Weights, batches and dropout follow from the seed alone, for which PyTorch's default generators are seeded. `prepare`
        may give the model other weights before it is dealt out to the processes.
        """
        device, recipe = torch.device(device), task.recipe.changed(steps=steps)
        recipe.check(ranks.count)
        watch = Watch(attention)
        torch.manual_seed(seed)
        model = task.build(attention if recipe.compile else watch)
        prepare(model)
        runs = ranks.wrapped(model.to(device))
        if recipe.compile:
            model.compile()
        torch.manual_seed(seed + 1 + ranks.rank)  # each process drops out its own
        scaler = torch.amp.GradScaler(device.type, enabled=recipe.amp == "fp16")
        generator = torch.Generator().manual_seed(seed)
        return cls(task, recipe, model, runs, _optimizer(model, recipe), scaler, generator, device, ranks, watch)

    @property
    def steps(self) -> int:
        return self.recipe.steps

    def step(self) -> float:
        """One update; returns the mean loss of its batch, before it."""
        done = len(self.losses)
        measured = done % MEASURED_EVERY == 2 and not self.recipe.compile
        with self.watch.measuring(self.device) if measured else contextlib.nullcontext():
            loss = self._update(self.recipe.rate(done))
        if measured and self.watch.share is not None:
            self.share = done + 1, self.watch.share
        self.losses.append(self.ranks.total(loss).item())
        return self.losses[-1]

    def _update(self, rate: float) -> Tensor:
        """Change the weights by one batch; returns this process's part of its mean loss."""
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.runs.train()
        batch = self.task.batch(self.generator, recipe.rows)
        self.tokens += self.task.tokens(batch)
        parts, loss = self.ranks.parts(batch, recipe.accumulate), torch.zeros((), device=self.device)
        weight = max(1, self.task.weight(batch))
        self.optimizer.zero_grad()
        for number, part in enumerate(parts, 1):
            # The mean over a batch is the sum of its parts' means, each by its part of what the mean is over.
            share = self.task.weight(part) / weight
            given = tuple(x.to(self.device) for x in self.task.load(part))
            with self.ranks.exchanging(self.runs, number == len(parts)):
                with self.autocast():
                    own = self.task.loss(self.runs, given) * share
                self.scaler.scale(own * self.ranks.count).backward()  # DDP and FSDP2 divide by the number of processes
            loss += own.detach()
        self.scaler.unscale_(self.optimizer)
        norm = whole(nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip))
        # A scaler leaves the step out and halves its scale, which is 1 without fp16; below that it has nothing to mend.
        if not norm.isfinite() and self.scaler.get_scale() <= 1:
            raise InputError(
                f"step {len(self.losses) + 1} has gradients that are not finite and is not made; the last checkpoint stays as "
                "it is: train anew with a smaller --learning-rate, or another --amp"
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss

    def autocast(self):
        """The precision of the forward pass."""
        return torch.autocast(self.device.type, DTYPES.get(self.recipe.amp), enabled=self.recipe.amp in DTYPES)

    def run(self, until: int | None = None, on_step: Callable[["Training"], bool | None] | None = None) -> None:
        """Step until `until` steps are done in all (default: the end), or until on_step, called after each, returns True."""
        while len(self.losses) < min(self.steps, self.steps if until is None else until):
            self.step()
            if on_step is not None and on_step(self):
                return

    def score(self) -> Score:
        """How good it is on held-out data. Every process of a training must ask."""
        self.model.eval()
        with torch.no_grad():
            return self.task.score(self.model, self.device)

    def save(self, path: Path) -> None:
        """Write everything to one file, whole or not at all. Every process of a training must call this; the first writes."""
        tensors = {f"model.{k}": whole(v) for k, v in self.model.state_dict().items()}
        for name, p in self.model.named_parameters():
            tensors |= {f"optimizer.{name}.{k}": whole(v) for k, v in self.optimizer.state.get(p, {}).items()}
        for rank, states in enumerate(self.ranks.gathered(_random_states(self.device))):
            tensors |= {f"rng.{rank}.{device}": state for device, state in states.items()}
        tensors["generator"] = self.generator.get_state()
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        about = Form.of(self.task).told() | {
            "recipe": json.dumps(dataclasses.asdict(self.recipe)),
            "source": json.dumps(dataclasses.asdict(self.task.data.source)),
            "ranks": json.dumps([self.ranks.kind, self.ranks.count]),
            "scaler": json.dumps(self.scaler.state_dict()),
        }
        if self.ranks.first:
            checkpoints.write(path, about, {k: v.detach().contiguous().cpu() for k, v in tensors.items()})

    @classmethod
    def load(
        cls, path: Path, attention: Callable[..., Tensor], device="cpu", model: str | None = None, ranks: Ranks = ALONE,
        data: Path | None = None,
    ) -> "Training":  # fmt: skip
        """The training that `save` wrote, of `model` if one is named, with its data where that was, or at `data`.

        CheckpointError if the file isn't one, or the data or the processes are others.
        """
        about, tensors = checkpoints.read(path)
        form = read_form(path, about, (model,) if model else tuple(kinds.MODELS))
        with refusing_others(path, form.kind):
            settings, source = json.loads(about["recipe"]), Source(**json.loads(about["source"]))
            recipe = Recipe(**settings | {"betas": tuple(settings["betas"])})
            _check_ranks(path, ranks, *json.loads(about["ranks"]))
        task = _reopened(path, form, recipe, source, data)

        def prepare(model: nn.Module) -> None:
            with refusing_others(path, form.kind):
                model.load_state_dict(checkpoints.under("model.", tensors))

        self = cls.start(task, attention, device=device, ranks=ranks, prepare=prepare)
        for name, p in self.model.named_parameters():
            kept = checkpoints.under(f"optimizer.{name}.", tensors)
            if kept:
                own = {k: placed(v.to(p.device), p) for k, v in kept.items() if k != "step"}
                self.optimizer.state[p] = own | {"step": kept["step"]}
        self.scaler.load_state_dict(json.loads(about["scaler"]))
        self.generator.set_state(tensors["generator"])
        _set_random_states(self.device, checkpoints.under(f"rng.{ranks.rank}.", tensors))
        self.losses = tensors["losses"].tolist()
        return self


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW, whose weight decay is of tensors with two dims or more: of weights and embeddings, not of biases and norms."""
    decayed, others = ([p for p in model.parameters() if (p.dim() > 1) is many] for many in (True, False))
    groups = [dict(params=decayed, weight_decay=recipe.weight_decay), dict(params=others, weight_decay=0.0)]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=recipe.learning_rate, betas=recipe.betas)


def _reopened(path: Path, form: Form, recipe: Recipe, source: Source, data: Path | None) -> Task:
    """The task of a checkpoint with the data that it was trained on."""
    where = data or (Path(source.path) if source.path else None)
    built_in = "another Python's text, or other digits, are built in here"
    try:
        task = opening.task(form.kind, form.config, recipe, where, form.tokenizer)
    except TokenizerError:
        raise CheckpointError(f"{path} can't go on: {built_in}; train anew") from None
    if task.data.source.digest != source.digest:
        what = f"the data at {where} is not what it was trained on" if where else built_in
        raise CheckpointError(f"{path} can't go on: {what}; name the right --data, or train anew")
    return task


def _check_ranks(path: Path, ranks: Ranks, kind: str, count: int) -> None:
    """CheckpointError where the processes are not as they were."""
    if (ranks.kind, ranks.count) != (kind, count):
        torchrun = f"torchrun --nproc-per-node {count} -m tfkern.cli train … --distributed {kind}"
        raise CheckpointError(
            f"{path} is of a training by {count} process(es) and --distributed {kind}, but here are {ranks.count} and "
            f"--distributed {ranks.kind}; go on by: {'tfkern train …' if kind == 'none' else torchrun} --resume"
        )


def _random_states(device: torch.device) -> dict[str, Tensor]:
    """What dropout comes from."""
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


def _set_random_states(device: torch.device, states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
