"""Text from the trained models."""

from collections.abc import Iterator

import torch

from tfkern.models import generation
from tfkern.models.gpt import GPT
from tfkern.models.tokens import Tokenizer
from tfkern.training.trainer import Training


def continuing(
    model: GPT, tokenizer: Tokenizer, prompt: str, count: int, temperature: float = 0.8, top_k: int | None = None,
    top_p: float | None = None, seed: int = 0,
) -> Iterator[str]:  # fmt: skip
    """What `count` tokens by a trained GPT after the prompt read as, piece by piece as they come."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    ids = torch.tensor([tokenizer.encode(prompt)], device=device)
    piece, new = [], []  # tokens of the last piece, which tell how the next one begins, and those since
    options = dict(temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    for token in generation.stream(model.eval(), ids, count, **options):
        new.append(int(token))
        told, text = tokenizer.decode(piece), tokenizer.decode([*piece, *new])
        if text != told and not text.endswith("\N{REPLACEMENT CHARACTER}"):  # else a character is not yet whole
            yield text[len(told) :]
            piece, new = new, []


def continued(training: Training, prompt: str, count: int, **options) -> str:
    """The prompt and what `continuing` gives, with its options."""
    return prompt + "".join(continuing(training.model, training.task.data.tokenizer, prompt, count, **options))


def filled(training: Training) -> str:
    """A held-out stretch of characters with holes, and how a trained BERT fills them."""
    task, corpus = training.task, training.task.data
    ids = corpus.held_out[200 : 200 + task.config.context][None]
    holes = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < task.recipe.mask_share
    with torch.no_grad():
        seen = torch.where(holes, task.mask_id, ids).to(training.device)
        guess = training.model.eval()(seen).argmax(-1).cpu()
    shown = "".join("_" if hole else c for hole, c in zip(holes[0], corpus.decode(ids[0]), strict=True))
    right = int((guess == ids)[holes].sum())
    told = corpus.decode(torch.where(holes, guess, ids)[0])
    return f"BERT fills in the characters marked _ ({right} of {int(holes.sum())} right):\n{shown}\n----\n{told}"
