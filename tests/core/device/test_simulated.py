"""The simulated device betrays what it is there for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from core.device.sending import send
from tests.core.device.simulated import DEVICE, SimulatedDevice


@pytest.fixture
def device() -> Iterator[SimulatedDevice]:
    with SimulatedDevice() as entered:
        yield entered


class TestWaits:
    @pytest.mark.parametrize(
        "ask",
        [
            lambda x: x.sum().item(),
            lambda x: x.tolist(),
            lambda x: x.cpu(),
            lambda x: bool((x > 1).any()),
            lambda x: x.nonzero(),
            lambda x: x[x > 1],
            lambda x: x.masked_select(x > 1),
            lambda x: torch.equal(x, x),
            lambda x: x.unique(),
            lambda x: torch.zeros(4).copy_(x),
            lambda x: x.copy_(torch.zeros(4)),
            lambda x: torch.zeros(4).to(DEVICE),
            lambda x: torch.zeros(4).to(DEVICE, non_blocking=True),
        ],
    )
    def test_an_answer_and_a_copy_are_waits(self, device: SimulatedDevice, ask: Callable[[Tensor], object]) -> None:
        x = torch.arange(4, device=DEVICE)
        assert not device.waits
        ask(x)
        assert device.waits.total() == 1

    def test_sending_and_computing_are_none(self, device: SimulatedDevice) -> None:
        x = send(torch.arange(4.0), DEVICE).requires_grad_()
        x.square().sum().backward()
        assert not device.waits
        assert x.grad is not None
        assert x.grad.tolist() == [0, 2, 4, 6]


class TestRefusals:
    @pytest.mark.parametrize(
        "make",
        [
            lambda x: x.double(),
            lambda x: torch.zeros(2, dtype=torch.float64, device=DEVICE),
            lambda x: x.to(torch.complex64),
        ],
    )
    def test_no_double_or_complex_tensors(self, device: SimulatedDevice, make: Callable[[Tensor], object]) -> None:
        with pytest.raises(AssertionError, match="on an NPU"):
            make(torch.ones(2, device=DEVICE))

    def test_no_operand_that_the_operator_does_not_take(self, device: SimulatedDevice) -> None:
        with pytest.raises(AssertionError, match="bool on an NPU"):
            (torch.ones(2, device=DEVICE) > 0).cumsum(0)

    def test_no_host_tensor_amid_those_of_the_device(self, device: SimulatedDevice) -> None:
        with pytest.raises(AssertionError, match="on the host and on the device"):
            torch.ones(3, device=DEVICE)[torch.tensor([0, 1])]
