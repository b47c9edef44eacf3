"""A class that no adapter knows becomes convertible through one registered adapter, as CONTRIBUTING.md says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import better_attention as ba
from better_attention.adapters import adapter as adapters
from better_attention.adapters.host_attention import HostAttention
from better_attention.adapters.source import LinearMap, Source
from helpers.layers import refused, tokens

B, L, E = 3, 5, 6


class Plain(nn.Module):
    """Attention of one head as people write it, without biases; its scores are divided by the whole width."""

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(E, E, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.wq(x) @ self.wk(x).mT / E).softmax(dim=-1)
        return self.wo(weights @ self.wv(x))


class ConvertedPlain(HostAttention):
    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x)[0]


def read(module: nn.Module) -> Source:
    q, k, v, o = (LinearMap.of(getattr(module, name)) for name in ("wq", "wk", "wv", "wo"))
    return Source(ba.Mechanism.of("standard"), E, 1, 1, E, 1.0 / E, 0.0, q=q, k=k, v=v, o=o)


@pytest.fixture
def registered() -> Iterator[None]:
    found = adapters.Adapter("plain", "mine", lambda m: isinstance(m, Plain), read, ConvertedPlain.take_over)
    adapters.register(found)
    yield
    adapters.unregister("plain")


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("mechanism", ["standard", "optimised", "efficient", "super"])
def test_a_class_with_an_adapter_is_converted_and_saved(mechanism: str, tmp_path: Path) -> None:
    model, x = nn.Sequential(Plain(), nn.Tanh(), Plain()), tokens(B, L, E, dtype=torch.float32)
    want = model(x)
    assert ba.convert(model, mechanism, max_len=L if mechanism == "super" else None).exact
    torch.testing.assert_close(model(x), want, rtol=0, atol=1e-5)
    assert isinstance(model[0], HostAttention)
    ba.save_converted(model, tmp_path)
    loaded = ba.load_converted(nn.Sequential(Plain(), nn.Tanh(), Plain()), tmp_path)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.usefixtures("registered")
def test_a_name_is_registered_once() -> None:
    again = adapters.Adapter("plain", "mine", lambda m: False, read, ConvertedPlain.take_over)
    refused(lambda: adapters.register(again), "plain", kind=ValueError)


def test_without_its_adapter_the_class_is_unknown() -> None:
    refused(lambda: ba.convert(nn.Sequential(Plain()), "efficient"), "no attention", kind=ValueError)
    refused(lambda: adapters.unregister("plain"), "plain", kind=ValueError)
