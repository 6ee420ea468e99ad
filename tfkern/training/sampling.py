"""Text from the trained models."""

from collections.abc import Iterator

import torch

from tfkern.training import data
from tfkern.training.trainer import Training


def continuing(
    training: Training, prompt: str, count: int, temperature: float = 0.8, top_k: int | None = None, seed: int = 0
) -> Iterator[str]:
    """`count` characters by a trained GPT after the prompt, one by one as they come."""
    generator = torch.Generator(training.device).manual_seed(seed)
    model, ids = training.model.eval(), data.corpus().encode(prompt).to(training.device)[None]
    for _ in range(count):
        ids = model.generate(ids[:, -model.config.context :], 1, temperature, top_k, generator=generator)
        yield data.corpus().decode(ids[0, -1:])


def continued(training: Training, prompt: str, count: int, **options) -> str:
    """The prompt and what `continuing` gives, with its options."""
    return prompt + "".join(continuing(training, prompt, count, **options))


def filled(training: Training) -> str:
    """A held-out stretch with holes, and how a trained BERT fills them."""
    task, corpus = training.task, data.corpus()
    ids = corpus.held_out[200 : 200 + task.context][None]
    holes = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < task.share
    with torch.no_grad():
        seen = torch.where(holes, task.mask_id, ids).to(training.device)
        guess = training.model.eval()(seen).argmax(-1).cpu()
    shown = "".join("_" if hole else c for hole, c in zip(holes[0], corpus.decode(ids[0]), strict=True))
    right = int((guess == ids)[holes].sum())
    told = corpus.decode(torch.where(holes, guess, ids)[0])
    return f"BERT fills in the characters marked _ ({right} of {int(holes.sum())} right):\n{shown}\n----\n{told}"
