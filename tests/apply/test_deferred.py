from __future__ import annotations

import pytest
import torch
from torch import nn

from autoplan.apply.deferred import named_tensors, record
from autoplan.errors import UsageError
from tests.apply.models import FACTORIES


class ByValue(nn.Module):
    """Initialised by functions that look at values, twice and on a part too."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.randn(8, 6)) for _ in range(3))
        self.d = nn.Parameter(torch.empty(4, 4, 3))
        nn.init.trunc_normal_(self.a, std=0.02)
        nn.init.trunc_normal_(self.a, std=0.5, a=-0.1, b=0.1)
        nn.init.trunc_normal_(self.b.data[:4], std=0.02)
        nn.init.orthogonal_(self.c)
        nn.init.sparse_(self.b.data[4:], 0.5)
        nn.init.dirac_(self.d)


BUILDERS = {**FACTORIES, "by value": ByValue}


@pytest.mark.parametrize("name", list(BUILDERS))
def test_values_equal_the_constructors_bit_for_bit(name):
    torch.manual_seed(7)
    expected = dict(named_tensors(BUILDERS[name]()))
    deferred = record(BUILDERS[name])
    assert all(parameter.is_meta for parameter in deferred.model.parameters())
    found = {}
    deferred.values(7, lambda key, tensor: found.__setitem__(key, tensor.clone()))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("name", list(FACTORIES))
def test_about_one_parameter_is_alive_at_a_time(name):
    deferred = record(FACTORIES[name])
    deferred.values(0, lambda key, tensor: None)
    sizes = [parameter.numel() * 4 for parameter in deferred.model.parameters()]
    assert deferred.recording.peak <= 3 * max(sizes) < sum(sizes) / 2


def test_a_constructor_that_reads_values_is_refused():
    def factory():
        return nn.Linear(2, int(torch.ones(3).sum().item()))

    with pytest.raises(UsageError, match="reads a tensor's values"):
        record(factory)
