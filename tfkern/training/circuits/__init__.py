"""Attention-only transformers on repeated random tokens: how induction heads form, and what they are made of."""
