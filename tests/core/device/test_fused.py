"""The hand-written backward passes against autograd's of the reference."""

import pytest
import torch
from torch import Tensor

from core.device import reference
from core.device.cpu import CpuAccelerator


def gradients(function, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Output and gradients of a function for a random gradient of its output."""
    leaves = [value.clone().requires_grad_() for value in inputs]
    output = function(*leaves)
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(1)))
    return output.detach(), *(leaf.grad for leaf in leaves)


class TestCpuKernels:
    def test_swiglu_equals_the_reference(self) -> None:
        x = torch.randn(5, 12)
        for ours, theirs in zip(gradients(CpuAccelerator().swiglu, x), gradients(reference.swiglu, x), strict=True):
            torch.testing.assert_close(ours, theirs)

    @pytest.mark.parametrize("shape", [(6, 8), (3, 2, 8)])
    def test_rms_norm_equals_the_reference(self, shape: tuple[int, ...]) -> None:
        x, weight = torch.randn(shape), torch.randn(8)
        ours = gradients(lambda x, w: CpuAccelerator().rms_norm(x, w, 1e-6), x, weight)
        theirs = gradients(lambda x, w: reference.rms_norm(x, w, 1e-6), x, weight)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other)

    def test_rms_norm_of_a_frozen_weight_or_input_gives_the_other_gradient_alone(self) -> None:
        x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(8)
        CpuAccelerator().rms_norm(x, weight, 1e-6).sum().backward()
        assert x.grad is not None
        weight.requires_grad_()
        CpuAccelerator().rms_norm(x.detach(), weight, 1e-6).sum().backward()
        assert weight.grad is not None

    def test_rotary_equals_the_reference_also_on_a_slice(self) -> None:
        angles = torch.randn(5, 4)
        cos, sin = (torch.cat((table, table), dim=-1) for table in (angles.cos(), angles.sin()))
        x = torch.randn(5, 3, 16)
        ours = gradients(lambda x: CpuAccelerator().rotary(x[..., 4:12], cos, sin), x)
        theirs = gradients(lambda x: reference.rotary(x[..., 4:12], cos, sin), x)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other)

    def test_bfloat16_is_left_to_the_reference(self) -> None:
        x = torch.randn(4, 8).bfloat16()
        assert torch.equal(CpuAccelerator().swiglu(x), reference.swiglu(x))
        weight = torch.randn(8).bfloat16()
        assert torch.equal(CpuAccelerator().rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))
