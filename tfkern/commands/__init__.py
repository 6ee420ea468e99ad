"""The subcommands of `tfkern`. Each module has add_arguments(parser), and run(args), which returns the exit status."""
