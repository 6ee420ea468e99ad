"""Inputs for any model of transformers, made up by the names of its arguments. Importing this imports no transformers."""

import inspect
from collections.abc import Iterator

import torch
from small_models import IMAGE, VOCAB, WORDS, within
from torch import Tensor, nn

BATCH, LENGTH, LENGTHS = 3, 11, (11, 8, 5)
FRAMES = ("num_frames", "frames_per_clip")


def padding(side: str | None, length: int) -> Tensor:
    """(BATCH, length), 1 = a word."""
    lengths = torch.tensor([-(-length * n // LENGTH) for n in LENGTHS])[:, None]
    mask = (torch.arange(length) < (lengths if side else length)).long().expand(BATCH, length)
    return (mask.flip(1) if side == "left" else mask).contiguous()


def _first(config, *names, default=None):
    """The first of these that a config, or one within it, has."""
    for name in names:
        for found in within(config):
            value = getattr(found, name, None)
            if value is not None and not isinstance(value, dict):
                return value
    return default


def _image(config) -> tuple[int, int, int]:
    size = _first(config, "image_size", "img_size", "crop_size", default=IMAGE)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return int(_first(config, "num_channels", "in_channels", "in_chans", default=3)), min(height, 512), min(width, 512)


def _words(config, generator) -> Tensor:
    return torch.randint(WORDS, VOCAB - 1, (BATCH, LENGTH), generator=generator) % (_first(config, "vocab_size") or VOCAB)


def _box(config, generator) -> Tensor:
    corner = torch.randint(0, 30, (BATCH, LENGTH, 2), generator=generator)
    return torch.cat([corner, corner + 20], 2)


def _noise(*shape):
    """A maker of random numbers; of a shape that may come from the config."""

    def make(config, generator) -> Tensor:
        return torch.randn([x(config) if callable(x) else x for x in shape], generator=generator)

    return make


def _named(*names, default: int):
    return lambda config: int(_first(config, *names, default=default))


def _all(config, generator) -> Tensor:
    return torch.ones(BATCH, LENGTH, dtype=torch.long)


def _grid(config, generator) -> Tensor:
    return torch.tensor([[1, 4, 4]] * BATCH)


_IMAGES = [BATCH, *(lambda config, i=i: _image(config)[i] for i in range(3))]
_SOUND = _noise(BATCH, 40, _named("num_mel_bins", "input_feat_per_channel", "feature_size", "input_dim", "mel_dim", default=80))
_HIDDEN = _noise(BATCH, LENGTH, _named("hidden_size", "d_model", default=32))
_SERIES = _noise(BATCH, _named("context_length", default=32), _named("num_input_channels", default=1))
# {argument of a forward pass: what makes it}
MAKERS = dict(
    input_ids=_words, qformer_input_ids=_words, decoder_input_ids=lambda *args: _words(*args).flip(1)[:, :-2].contiguous(),
    pixel_values=_noise(*_IMAGES), pixel_values_videos=_noise(BATCH, _named(*FRAMES, default=4), *_IMAGES[1:]),
    input_values=_noise(BATCH, 6000), input_features=_SOUND, audio_values=_SOUND, spectrogram=_SOUND,
    attention_mask=_all, decoder_attention_mask=_all, input_features_mask=_all, qformer_attention_mask=_all,
    past_values=_SERIES, past_observed_mask=_SERIES, grid_thw=_grid, image_grid_thw=_grid, bbox=_box,
    visual_feats=_noise(BATCH, 5, _named("visual_feat_dim", default=16)), visual_pos=_noise(BATCH, 5, 4),
    inputs_embeds=_HIDDEN, hidden_states=_HIDDEN,
)  # fmt: skip
# Together, the likeliest first; arguments that a model doesn't have are left out.
TOGETHER = (
    ("input_ids", "bbox", "decoder_input_ids", "pixel_values", "visual_feats", "visual_pos"),
    ("input_ids", "bbox", "decoder_input_ids"), ("input_ids",), ("pixel_values",), ("pixel_values_videos",),
    ("input_features", "decoder_input_ids"), ("input_values", "decoder_input_ids"), ("input_features",), ("input_values",),
    ("inputs_embeds",), ("hidden_states",), (),
)  # fmt: skip


def inputs_of(model: nn.Module, side: str | None) -> Iterator[dict]:
    """Inputs that a model's forward pass may take, with those that it has to have; padded on a side, or not."""
    config, parameters = model.config, inspect.signature(model.forward).parameters
    required = [n for n, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    for together in TOGETHER:
        names = [n for n in dict.fromkeys([*together, *required]) if n in parameters and n in MAKERS]
        for name, shaped in SHAPES:
            generator = torch.Generator().manual_seed(0)
            inputs = {n: MAKERS[n](config, generator) for n in names}
            if not inputs or (name and name not in inputs):
                continue
            if name:
                inputs[name] = shaped(inputs[name], config)
            inputs = _padded(inputs, parameters, config, side)
            if "MultipleChoice" in type(model).__name__:
                inputs = {n: torch.stack([x, x.flip(0)], 1) for n, x in inputs.items()}
            yield inputs


def _video(x, config):
    frames = int(_first(config, *FRAMES, default=4))
    return x[:, None].expand(-1, frames, *x.shape[1:]).contiguous()


def _spectrogram(x, config):
    length, bins = int(_first(config, "max_length", default=40)), int(_first(config, "num_mel_bins", default=16))
    return torch.arange(BATCH * length * bins).reshape(BATCH, length, bins).float().sin()


def _patches(x, config):
    """Of three images of 4 x 4 patches, behind each other."""
    size = _first(config, "patch_size", default=8)
    patch = size**2 if isinstance(size, int) else size[-1] * size[-2]
    features = patch * int(_first(config, "in_channels", "num_channels", "in_chans", default=3))
    features *= int(_first(config, "temporal_patch_size", default=1))
    return torch.arange(BATCH * 16 * features).reshape(BATCH * 16, features).float().sin()


def _transposed(x, config):
    length = 2 * int(_first(config, "max_source_positions", default=32))
    return torch.nn.functional.pad(x, (0, 0, 0, max(0, length - x.shape[1])))[:, :length].transpose(1, 2).contiguous()


def _channel(x, config):
    return x[:, None]


# Other shapes that an argument may have to have.
SHAPES = (
    (None, None), ("pixel_values", _video), ("input_features", _transposed), ("input_values", _channel),
    ("input_values", _spectrogram), ("hidden_states", _patches), ("pixel_values", _patches),
)  # fmt: skip


def _padded(inputs: dict, parameters, config, side: str | None) -> dict:
    """Inputs and the masks of them."""
    first = ("input_ids", "input_values", "input_features", "inputs_embeds")
    whole = next((n for n in first if n in inputs and inputs[n].dim() < 4), None)
    for mask, of in (("attention_mask", whole), ("decoder_attention_mask", "decoder_input_ids")):
        if mask in parameters and of in inputs and (side or mask == "attention_mask"):
            inputs = inputs | {mask: padding(side, inputs[of].shape[1])}
            if inputs[of].dtype == torch.long and inputs[of].dim() == 2:
                inputs[of] = _spelled(inputs[of], inputs[mask], config)
    if "pixel_mask" in parameters and "pixel_values" in inputs and inputs["pixel_values"].dim() == 4:
        mask = torch.ones(BATCH, *inputs["pixel_values"].shape[2:], dtype=torch.long)
        if side == "right":
            mask[1:, :, IMAGE // 2 :] = 0
        inputs = inputs | {"pixel_mask": mask}
    return inputs


def _spelled(ids: Tensor, mask: Tensor, config) -> Tensor:
    """Ids with an end, and what pads them."""
    end, pad = _first(config, "eos_token_id"), _first(config, "pad_token_id", default=0)
    end = end[0] if isinstance(end, list | tuple) else end
    position = torch.arange(mask.shape[1])
    if end is not None:
        ids = torch.where(position == (position * mask).max(1, keepdim=True).values, end, ids)
    return torch.where(mask.bool(), ids, pad)
