import torch
from torch import nn

from core.models.layers.linear import Linear, linear
from core.models.layers.recompute import recomputed
from core.parallel.data import FlatBuffer


class TestLinear:
    def test_gradients_equal_autograds_and_add_up_over_micro_batches(self) -> None:
        layer, plain = Linear(6, 4), nn.Linear(6, 4)
        plain.load_state_dict(layer.state_dict())
        buffer = FlatBuffer(layer.named_parameters())
        for _ in range(2):
            x = torch.randn(5, 6)
            ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
            layer(ours).square().sum().backward()
            plain(theirs).square().sum().backward()
            torch.testing.assert_close(ours.grad, theirs.grad)
        for slot in buffer.slots:
            torch.testing.assert_close(slot.view(buffer.gradients), plain.get_parameter(slot.name).grad)

    def test_a_recomputed_layer_adds_its_gradient_once(self) -> None:
        layer = Linear(3, 3, bias=False)
        FlatBuffer(layer.named_parameters())
        x = torch.randn(4, 3, requires_grad=True)
        recomputed(lambda y: layer(layer(y)), x).sum().backward()
        expected = layer.weight.detach().clone().requires_grad_()
        (x.detach() @ expected.t() @ expected.t()).sum().backward()
        torch.testing.assert_close(layer.weight.grad, expected.grad)

    def test_a_frozen_weight_gets_no_gradient(self) -> None:
        weight = nn.Parameter(torch.randn(4, 3), requires_grad=False)
        x = torch.randn(2, 3, requires_grad=True)
        linear(x, weight).sum().backward()
        assert weight.grad is None
        assert x.grad is not None
