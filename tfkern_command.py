"""Where the `tfkern` command begins: beside the package, whose import takes seconds, in which an interrupt is to be as quiet as
later."""

import signal


def main() -> int:
    """tfkern.cli.main, imported while an interrupt is the system's to handle."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:  # and not ignored, as in the background
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from tfkern.cli import main as command

    signal.signal(signal.SIGINT, handler)
    return command()
