import math

import torch

from dglm.annealing import log_mean_exp, log_mean_standard_error, weight_effective_sample_size


def test_means_of_weights_neither_overflow_nor_vanish() -> None:
    weights = torch.rand(3, 20)
    for shift in (-1e4, 0.0, 1e4):
        logs = weights.log() + shift
        mean = weights.mean(dim=1)
        torch.testing.assert_close(log_mean_exp(logs), mean.log() + shift)
        error = weights.std(dim=1) / math.sqrt(20) / mean
        torch.testing.assert_close(log_mean_standard_error(logs), error)
        size = weights.sum(dim=1).square() / weights.square().sum(dim=1)
        torch.testing.assert_close(weight_effective_sample_size(logs), size)


def test_effective_sample_size_lies_between_one_and_all() -> None:
    equal, single = torch.zeros(1, 20), torch.full((1, 20), -800.0)
    single[0, 3] = 0.0
    torch.testing.assert_close(weight_effective_sample_size(equal), torch.tensor([20.0]))
    torch.testing.assert_close(weight_effective_sample_size(single), torch.tensor([1.0]))


def test_one_weight_has_no_standard_error() -> None:
    assert log_mean_standard_error(torch.zeros(3, 1)).isnan().all()
