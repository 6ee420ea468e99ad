"""The `tfkern` command: one subcommand a module of tfkern.commands."""

import argparse
import os
import sys

import torch

import tfkern
from tfkern.commands import bench, circuits, classify, demo, generate, info, similar, train, verify
from tfkern.ending import ended
from tfkern.extras import MissingExtraError

COMMANDS = {
    "info": info, "verify": verify, "demo": demo, "train": train, "generate": generate, "classify": classify,
    "similar": similar, "circuits": circuits, "bench": bench,
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run one command; its exit status: 0 done, 1 a check failed; tfkern/ending.py has the others."""
    arguments = sys.argv[1:] if argv is None else argv
    name = f"tfkern {arguments[0]}" if arguments and arguments[0] in COMMANDS else "tfkern"
    return ended(name, lambda: _run(arguments), (MissingExtraError, ValueError, tfkern.UnsupportedError))


def _run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="tfkern", description=tfkern.__doc__)
    parser.add_argument("--version", action="version", version=f"tfkern {tfkern.__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        summary = module.__doc__.strip().splitlines()[0]
        module.add_arguments(subparsers.add_parser(name, help=summary, description=module.__doc__))
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # the kernels still run, in Triton's interpreter
    return COMMANDS[args.command].run(args)


if __name__ == "__main__":
    sys.exit(main())
