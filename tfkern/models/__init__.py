"""Reference models, each in one file that reads beside its paper. Each takes the attention function as an argument.

`ladder` leads up to them, one small file a step."""
