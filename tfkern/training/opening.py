"""From a kind of model, its sizes and where the data is to the task that trains it."""

from pathlib import Path

from tfkern.ending import InputError
from tfkern.models.tokens import Tokenizer
from tfkern.training import data, files, kinds
from tfkern.training.classifying import JudgeSentences, ReadImages
from tfkern.training.recipe import Recipe
from tfkern.training.tasks import FillIn, LearnText, Task


def task(kind: str, config: kinds.Config, recipe: Recipe, path: Path | None, tokenizer: Tokenizer | None = None) -> Task:
    """The task of a kind with the data at a path, None being the built-in data. InputError where the data won't do."""
    if kind in ("vit", "mixer"):
        if config.image % config.patch:
            raise InputError(f"--image must be a multiple of --patch, but they are {config.image} and {config.patch}")
        pictures = path and files.pictures(path, config.image, config.channels)
        return ReadImages(config, recipe, pictures, kind)
    if kind == "bert-classifier":
        sentences = files.sentences(path, tokenizer, ("mask", "cls"))
        _has(sentences.tokenizer, "cls", "mask")
        _has_room(config, 1 + (sentences.tokenizer.special("sep") is not None))
        return JudgeSentences(config, recipe, sentences)
    return _of_text(LearnText if kind == "gpt" else FillIn, config, recipe, path, tokenizer)


def _of_text(cls: type[LearnText] | type[FillIn], config, recipe, path, tokenizer) -> Task:
    """gpt or bert on a text that is long enough."""
    corpus = None
    if path:
        corpus = files.corpus(path, tokenizer, ("mask", "cls") if cls is FillIn else ())
    elif tokenizer:
        corpus = data.Corpus.of(data.text(), tokenizer)
    found = cls(config, recipe, corpus)
    if cls is FillIn:
        _has(found.data.tokenizer, "mask")
        _has_room(config, sum(map(len, found.framed)))
    needed = config.context + 1
    train, held_out = len(found.data.train), len(found.data.held_out)
    if min(train, held_out) < needed:
        raise InputError(
            f"{path or 'the built-in text'} has {train} tokens to train on and {held_out} held out, but a context of "
            f"{config.context} needs {needed} of each: give a longer text, or a smaller --context"
        )
    return found


def _has_room(config: kinds.Config, frame: int) -> None:
    """InputError unless tokens fit between those that begin and end a row."""
    if config.context <= frame:
        raise InputError(f"--context must be {frame + 1} or more, since {frame} tokens frame each row, but is {config.context}")


def _has(tokenizer: Tokenizer, *purposes: str) -> None:
    """InputError unless a tokenizer has a special token for one of the purposes."""
    if all(tokenizer.special(purpose) is None for purpose in purposes):
        raise InputError(f"the tokenizer must have a special token for {' or '.join(purposes)}, which bert needs, but has none")
