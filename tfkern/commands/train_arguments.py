"""The flags of `tfkern train`, and the task that they describe."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from torch import nn

import tfkern
from tfkern.commands.arguments import SEED, number
from tfkern.ending import InputError
from tfkern.models.tokens import Subwords
from tfkern.training import kinds, opening, origin, presets
from tfkern.training.distributed import KINDS
from tfkern.training.presets import PRESETS
from tfkern.training.recipe import AMP, Recipe
from tfkern.training.tasks import Task

POSITIVE = number(int, 1)
# Flags that change one value of a recipe, by the name of the value: (type, help).
RECIPE = {
    "steps": (POSITIVE, "updates in all"),
    "rows": (POSITIVE, "examples of one update, of all processes and accumulated parts together"),
    "learning_rate": (number(float, 0.0, 1e6), "at its peak"),
    "warmup": (number(int, 0), "steps in which the learning rate rises"),
    "weight_decay": (number(float, 0.0, 1e6), "of weights and embeddings, not of biases and norms"),
    "clip": (number(float, 1e-6), "the largest norm of all gradients together"),
    "accumulate": (POSITIVE, "parts in which a batch is run, one after the other, to save memory"),
    "mask_share": (number(float, 0.01, 1.0), "bert's pre-training: the share of tokens to be told"),
}
# Flags that change one size of a model, by the name of the size in the config: (type, help).
SIZES = {
    "context": (number(int, 2), "tokens that gpt or bert sees at once"),
    "image": (POSITIVE, "pixels along a side of vit's or mixer's images"),
    "patch": (POSITIVE, "pixels along a side of a patch"),
    "layers": (POSITIVE, "blocks"),
    "heads": (POSITIVE, "attention heads of a block"),
    "width": (POSITIVE, "numbers of a token"),
    "dropout": (number(float, 0.0, 1.0), "after the embeddings and each residual branch"),
}


def add_arguments(parser) -> None:
    parser.add_argument("model", choices=list(presets.BUILT_IN))
    parser.add_argument(
        "--preset", help=f"sizes and settings by name: {', '.join(PRESETS)} (default: a small one of the model)"
    )
    parser.add_argument("--out", type=Path, default=Path("tfkern-out"), help="folder of the checkpoint MODEL.safetensors")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, bit for bit")
    parser.add_argument("--seed", type=SEED, help="of weights, batches and dropout (default: 0)")
    parser.add_argument("--save-every", type=POSITIVE, default=50, metavar="STEPS")
    own = parser.add_argument_group("own data")
    own.add_argument(
        "--data", type=Path, metavar="PATH",
        help="a UTF-8 text file; for vit and mixer a folder with a subfolder of images for each class (default: built-in)",
    )  # fmt: skip
    own.add_argument("--classify", type=Path, metavar="FILE.tsv", help="fine-tune bert on lines of label, tab, sentence")
    own.add_argument(
        "--tokenizer", type=Path, metavar="tokenizer.json", help="of gpt and bert (default: characters are tokens)"
    )
    own.add_argument("--from", type=Path, dest="origin", metavar="PATH",
                     help="begin with the weights of this checkpoint, or of a folder as transformers writes it")  # fmt: skip
    how = parser.add_argument_group("settings, each in place of the preset's")
    _add(how, RECIPE)
    how.add_argument("--amp", choices=AMP, help="precision of autocast; fp16 scales the loss")
    how.add_argument("--compile", action="store_true", default=None, help="run the model through torch.compile")
    how.add_argument("--distributed", choices=KINDS, default="none",
                     help="under torchrun: ddp, or fsdp (FSDP2), which splits the weights, too")  # fmt: skip
    _add(parser.add_argument_group("sizes, each in place of the preset's"), SIZES)


def _add(group, flags: dict) -> None:
    for name, (kind, help_text) in flags.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, help=help_text, metavar="N")


def check(args) -> None:
    """Raise InputError for flags that don't go together. Nothing is read yet."""
    texts = args.model in ("gpt", "bert")
    if args.classify and args.model != "bert":
        raise InputError(f"--classify is for bert, but the model is {args.model}")
    if args.classify and args.data:
        raise InputError("--classify and --data can't be given together: sentences are in the file that --classify names")
    if args.mask_share is not None and kind(args) != "bert":
        raise InputError(f"--mask-share is for the pre-training of bert, but this trains {kind(args)}; leave it out")
    if args.tokenizer and not texts:
        raise InputError(f"--tokenizer is for gpt and bert, but the model is {args.model}")
    sizes = [name for name in SIZES if getattr(args, name) is not None]
    known = {field.name for field in dataclasses.fields(kinds.MODELS[args.model].config_class)}
    if unknown := [name for name in sizes if name not in known]:
        raise InputError(f"--{unknown[0]} is not a size of {args.model}; leave it out")
    if args.origin and set(sizes) - {"dropout"}:
        raise InputError(f"--{sizes[0]} can't be given with --from, whose model has its sizes already")
    if args.resume and (
        given := [flag for flag in ("preset", "tokenizer", "seed", "origin") if getattr(args, flag) is not None]
    ):
        flag = given[0].replace("origin", "from")
        raise InputError(f"--{flag} can't be given with --resume, which takes everything from the checkpoint; leave it out")
    fitting = [name for name, preset in PRESETS.items() if preset.model == args.model]
    if args.preset is not None and args.preset not in fitting:
        raise InputError(f"--preset must be one of {', '.join(fitting)} for {args.model}, but is {args.preset!r}")


def kind(args) -> str:
    """The kind of model that is trained, by its name in checkpoints."""
    return "bert-classifier" if args.classify else args.model


def task(args) -> tuple[Task, Callable[[nn.Module], object]]:
    """Return (the task with its data read, a function that gives a new model its first weights)."""
    preset = PRESETS[args.preset or (presets.OWN if args.data else presets.BUILT_IN)[args.model]]
    begun = origin.read(args.origin, kind(args), tfkern.attention) if args.origin else None
    tokenizer = Subwords.read(args.tokenizer) if args.tokenizer else begun and begun.tokenizer
    if begun and not tokenizer and args.model in ("gpt", "bert"):
        raise InputError(f"--from {args.origin} brings no tokenizer.json; name one by --tokenizer")
    config = dataclasses.replace(begun.config if begun else preset.config, **_given(args, SIZES))
    if config.width % getattr(config, "heads", 1):
        raise InputError(f"--width must be a multiple of --heads, but they are {config.width} and {config.heads}")
    found = opening.task(kind(args), config, _recipe(args, preset), args.classify or args.data, tokenizer)
    return found, begun.give if begun else lambda model: None


def _recipe(args, preset: presets.Preset) -> Recipe:
    """The preset's recipe, or with --from and no --preset the recipe of fine-tuning, changed by the flags."""
    recipe = preset.classify if args.classify else preset.recipe
    if args.origin and not args.preset:
        recipe = presets.TUNING
    return recipe.changed(**_given(args, (*RECIPE, "amp", "compile")))


def _given(args, names) -> dict:
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def refuse_changes(args, path: Path, recipe: Recipe, config: kinds.Config) -> None:
    """Raise InputError for a flag beside --resume whose value differs from the checkpoint's."""
    for told, names in ((recipe, (*RECIPE, "amp", "compile")), (config, SIZES)):
        for name, value in _given(args, names).items():
            own = getattr(told, name)
            if value != own:
                flag = f"--{name.replace('_', '-')}"
                raise InputError(
                    f"{path} is of a training {f'without {flag}' if own in (None, False) else f'with {flag} {own}'}, on which "
                    f"what comes next depends; "
                    f"{flag} {value} does not fit: leave it out, or train anew into another --out"
                )
