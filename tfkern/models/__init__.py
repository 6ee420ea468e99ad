"""Reference models, each in one file that reads beside its paper. Each takes the attention function as an argument.

`from_pretrained` and `save_pretrained` read and write their weights by others' names. `ladder` leads up to the models, one
small file a step.
"""

from tfkern.models.pretrained import from_pretrained, save_pretrained

__all__ = ["from_pretrained", "save_pretrained"]
