"""What `make gpu` runs on a GPU machine: __main__.py has the steps of its three calls. The wheel does not have it."""
