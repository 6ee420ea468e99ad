"""Reference models, each in one file that reads beside its paper. Each takes the attention function as an argument.

The models: gpt, llama, bert, vit, mixer, attention_only; and ladder, which leads up to them, one small file a step.
What they use: generation (text, token by token), tokens (tokenizers), sentences (vectors of sentences by a BERT).
Their weights: pretrained (`from_pretrained`, `save_pretrained`), weights (names, as tables), sizes (others' configs), files and
gguf_file (reading and writing).
"""

from tfkern.models.pretrained import from_pretrained, save_pretrained

__all__ = ["from_pretrained", "save_pretrained"]
