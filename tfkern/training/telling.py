"""Classes told by trained models, for images in files and for sentences."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tfkern.ending import InputError
from tfkern.models.tokens import TokenizerError
from tfkern.training import files
from tfkern.training.classifying import padded
from tfkern.training.trained import Trained

ROWS = 64  # of one forward


@torch.no_grad()
def probabilities(trained: Trained, inputs: Sequence[str]) -> Tensor:
    """(inputs, classes): of each input, a file's name or a sentence, the probability of each class.

    InputError for an image that can't be read or a sentence that has no tokens, before anything is computed.
    """
    given = _sentences(trained, inputs) if trained.form.kind == "bert-classifier" else _images(trained, inputs)
    batches = zip(*(x.split(ROWS) for x in given), strict=True)
    logits = torch.cat([trained.model(*(x.to(trained.device) for x in batch)) for batch in batches])
    return torch.softmax(logits.float(), -1).cpu()


def _images(trained: Trained, inputs: Sequence[str]) -> tuple[Tensor]:
    config = trained.form.config
    return (files.scaled(torch.stack([files.picture(Path(name), config.image, config.channels) for name in inputs])),)


def _sentences(trained: Trained, inputs: Sequence[str]) -> tuple[Tensor, Tensor]:
    tokenizer = trained.form.tokenizer
    try:
        ids = [tokenizer.encode(sentence) for sentence in inputs]
    except TokenizerError as error:
        raise InputError(f"a sentence can't be read: {error}") from None
    if empty := [sentence for sentence, found in zip(inputs, ids, strict=True) if not found]:
        raise InputError(f"a sentence must have a token or more, but {empty[0]!r} has none")
    return padded(ids, tokenizer, trained.form.config.context)
