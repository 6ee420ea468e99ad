"""Text from the trained models."""

import torch

from tfkern.training import data
from tfkern.training.trainer import Training


def continued(
    training: Training, prompt: str, count: int, temperature: float = 0.8, top_k: int | None = None, seed: int = 0
) -> str:
    """The prompt and `count` characters more by a trained GPT."""
    generator = torch.Generator(training.device).manual_seed(seed)
    ids = data.corpus().encode(prompt).to(training.device)[None]
    return data.corpus().decode(training.model.eval().generate(ids, count, temperature, top_k, generator)[0])


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
