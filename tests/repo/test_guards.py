"""What every test runs under holds. The oracle is the failure that each guard of ``conftest.py`` promises."""

import random
import socket

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from ds_lightning.nn.norm import RMSNorm

SEEN: list[tuple[float, float, float]] = []


def test_unwritten_memory_is_nan() -> None:
    assert torch.empty(3).isnan().all()


@pytest.mark.parametrize("time", [1, 2])
def test_every_test_starts_from_the_same_seeds(time: int) -> None:
    SEEN.append((random.random(), float(np.random.rand()), torch.rand(()).item()))
    assert len(SEEN) == time
    assert len(set(SEEN)) == 1


def test_a_wrong_dtype_is_refused() -> None:
    with pytest.raises(TypeCheckError, match="Float"):
        RMSNorm(4, 1e-6)(torch.zeros(2, 3, 4, dtype=torch.int64))


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1"])
def test_the_network_is_closed(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as client:
        client.settimeout(0.1)
        with pytest.raises(RuntimeError, match="a test reached for the network"):
            client.connect((host, 80))
        with pytest.raises(RuntimeError, match="a test reached for the network"):
            client.connect_ex((host, 80))


def test_names_of_other_machines_are_not_looked_up() -> None:
    with pytest.raises(RuntimeError, match=r"a test reached for the network: 'example\.org'"):
        socket.create_connection(("example.org", 80), timeout=0.1)


def test_the_loopback_is_open() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        assert client.getpeername() == server.getsockname()
