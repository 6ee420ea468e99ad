"""The code that `make gpu` runs on a GPU machine. __main__.py lists the steps of its three calls. It is not in the wheel."""
