import pytest
import torch
from torch import Tensor, nn

from samplers.networks import UpdateNetwork, embedding_network


@pytest.fixture
def network() -> UpdateNetwork:
    """A network with the weights of a trained one, not those of its initialisation."""
    network = UpdateNetwork(dim=3, hidden=8, head_scale=1.0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
    return network


@pytest.fixture
def inputs() -> list[Tensor]:
    return [torch.randn(5, 3), torch.randn(5, 3), torch.randn(5, 2)]


def test_updates_by_hand(network: UpdateNetwork, inputs: list[Tensor]) -> None:
    context = torch.randn(5, 8)
    hidden = (torch.cat(inputs, dim=-1) @ network.inputs.weight.T + network.inputs.bias) + context
    hidden = hidden.clamp(min=0) @ network.trunk.weight.T + network.trunk.bias
    outputs = hidden.clamp(min=0) @ network.heads.weight.T + network.heads.bias
    amplitude = network.log_amplitude.exp()
    scale, translation, gate = network(*inputs, context)
    torch.testing.assert_close(scale, amplitude[:3] * outputs[:, :3].tanh())
    torch.testing.assert_close(gate, amplitude[3:] * outputs[:, 3:6].tanh())
    torch.testing.assert_close(translation, outputs[:, 6:])


@pytest.mark.parametrize("head_scale", [1e-3, 0.0])
def test_starts_near_hamiltonian_dynamics(inputs: list[Tensor], head_scale: float) -> None:
    for output in UpdateNetwork(dim=3, hidden=8, head_scale=head_scale)(*inputs, None):
        assert output.abs().max() < 1e-2
        assert (output != 0).any() == (head_scale > 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fault", ["nan", "inf", "-inf", "largest"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_lost_chain_leaves_no_trace_in_the_gradients_of_the_others(
    network: UpdateNetwork, inputs: list[Tensor], which: int, fault: str, dtype: torch.dtype
) -> None:
    network = network.to(dtype)
    inputs = [tensor.to(dtype) for tensor in inputs]
    broken = [tensor.clone() for tensor in inputs]
    broken[which][0] = torch.finfo(dtype).max if fault == "largest" else float(fault)

    def gradients(inputs: list[Tensor], rows: slice) -> tuple[Tensor, ...]:
        loss = sum(output[rows].square().sum() for output in network(*inputs, None))
        return torch.autograd.grad(loss, list(network.parameters()))

    healthy = gradients([tensor[1:] for tensor in inputs], slice(None))
    torch.testing.assert_close(gradients(broken, slice(1, None)), healthy)


def test_embedding_has_softplus_between_linear_layers() -> None:
    layers = embedding_network([4, 6, 5, 3])
    assert [type(layer) for layer in layers] == [
        nn.Linear, nn.Softplus, nn.Linear, nn.Softplus, nn.Linear,
    ]  # fmt: skip
    assert layers(torch.randn(2, 4)).shape == (2, 3)
    assert [type(layer) for layer in embedding_network([4, 3])] == [nn.Linear]
