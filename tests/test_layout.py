"""Strides: memory order, what is promised to the compiler, and that no length changes it."""

import torch

from tfkern import layout


def decoded(vec, strides):
    return [tuple((x - 3) // 2 * max(vec, 1) for x in s) for s in strides]


def test_vec_does_not_depend_on_length():
    for length in (1, 2, 3, 16, 31, 197, 512, 1000):
        for head_dim, want in ((64, 16), (80, 16), (40, 8), (20, 4), (59, 1)):
            x = torch.empty(2, length, 3, 4, head_dim).permute(2, 0, 3, 1, 4)[0]
            vec, strides = layout.kernel_strides(x)
            assert vec == want
            assert decoded(vec, strides)[0][:3] == tuple(
                s if n > 1 else 0 for s, n in zip(x.stride()[:3], x.shape[:3], strict=True)
            )


def test_strides_never_look_special_to_the_jit():
    for shape in ((1, 1, 1, 1), (2, 2, 16, 16), (3, 1, 5, 1), (2, 4, 17, 64)):
        _, strides = layout.kernel_strides(torch.empty(shape), torch.empty(shape).transpose(1, 2))
        assert all(x % 2 == 1 and x >= 3 for s in strides for x in s)


def test_any_stride_otherwise():
    x = torch.empty(2, 64, 4, 10).permute(0, 2, 3, 1)
    assert layout.kernel_strides(x)[0] == 0
    assert decoded(*layout.kernel_strides(x)) == [x.stride()]


def test_rows_too_far_apart_for_int32_take_the_general_form():
    far = torch.empty_strided((2, 2, 2, 64), (0, 0, 2**24, 1), device="meta")
    assert layout.kernel_strides(far)[0] == 0
    near = torch.empty_strided((2, 2, 2, 64), (0, 0, layout.MAX_ROW_STRIDE - 16, 1), device="meta")
    assert layout.kernel_strides(near)[0] == 16


def test_size_one_and_expanded_dims_do_not_decide_the_order():
    x = torch.empty(1, 20, 3, 16).transpose(1, 2)  # (1, 3, 20, 16), N before H in memory
    assert layout.empty_in_order_of(x, 8).transpose(1, 2).is_contiguous()
    expanded = torch.empty(1, 3, 20, 16).expand(5, 3, 20, 16)
    assert layout.empty_in_order_of(expanded, 16).is_contiguous()
    assert layout.empty_in_order_of(torch.empty(0, 3, 4, 5), 2).shape == (0, 3, 4, 2)
