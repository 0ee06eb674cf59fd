from typing import Any

import pytest
import torch

from samplers import Moments, seeded_generator
from samplers.metric import check_spread, measured_jump

WHITENING = ("deviation", "covariance", "squares")


@pytest.mark.parametrize("metric", WHITENING)
def test_draws_that_do_not_differ_are_refused_in_one_line(metric: Any) -> None:
    # A mean that is not exact, so that deviations from it are not zero.
    for draws in (torch.zeros(6, 3), torch.full((7, 3), 0.1), torch.zeros(5, 3) + torch.eye(5, 3)):
        check_spread("plain", draws)
        draws[:, 2] = draws[0, 2]
        with pytest.raises(ValueError, match=rf"{metric}.* start apart in all directions") as error:
            check_spread(metric, draws)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("metric", ["covariance", "squares"])
def test_draws_in_a_plane_are_refused(metric: Any) -> None:
    draws = torch.randint(-5, 5, (8, 3), generator=seeded_generator("cpu", 0)).double()
    check_spread(metric, draws)
    draws[:, 2] = draws[:, 0]
    check_spread("deviation", draws)
    with pytest.raises(ValueError, match="start apart in all directions"):
        check_spread(metric, draws)


@pytest.mark.parametrize("metric", ["covariance", "squares"])
def test_the_covariance_is_factored_once(metric: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, cholesky = [], torch.linalg.cholesky
    monkeypatch.setattr(torch.linalg, "cholesky", lambda a: calls.append(a) or cholesky(a))
    before, after = torch.randn(2, 8, 3)
    assert (measured_jump(metric, Moments.of(before), before, after) > 0).all()
    assert len(calls) == 1
