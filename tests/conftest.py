"""What every test runs under: checked shapes, fixed seeds, deterministic and poisoned memory, no network.

The import hook comes first: it turns the shapes and dtypes in the signatures of the model's packages into run-time
checks that cost nothing outside tests. The other packages stay out of it: what users can get wrong they refuse with
messages of their own, callbacks are tested on stand-ins for a trainer, and beartype draws from Python's global
generator to pick the item of a container that it looks at, which tests of an exact resume would see.
"""

import os
import random
import signal
import socket
from collections.abc import Iterator
from typing import Any

import jaxtyping

_SHAPED = ("ops", "nn", "models", "losses", "generation")
jaxtyping.install_import_hook([f"ds_lightning.{name}" for name in _SHAPED], "beartype.beartype")
os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries are imported: local folders only, at once

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

_LOOPBACK = ("127.", "::1", "localhost", "0.0.0.0")


def pytest_configure() -> None:
    """Share the cores with tests beside these; more than a few threads slow the small tensors of tests down."""
    beside = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, min(torch.get_num_threads() // beside, 4)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """Seed all three generators; make memory that nobody wrote NaN, so that reading it shows."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _process_state() -> dict[str, Any]:
    """Return what a test may change of its process, and what the processes that it starts inherit.

    Not what libraries set and never reset: timers of pytest, seeds of Lightning, torch's watch over its readers.
    """
    signals = signal.valid_signals() - {signal.SIGALRM, signal.SIGCHLD}
    others = ("PYTEST_", "PL_", "TORCHINDUCTOR_", "PYTORCH_NVML_BASED_CUDA_CHECK")
    return {
        **{f"signal {number}": signal.getsignal(number) for number in signals},
        **{f"${name}": value for name, value in os.environ.items() if not name.startswith(others)},
        "blocked signals": signal.pthread_sigmask(signal.SIG_BLOCK, ()),
        "working directory": os.getcwd(),
        "threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
    }


@pytest.fixture(autouse=True, scope="module")
def _leaves_nothing_behind() -> Iterator[None]:
    """Fail a file that changes its process for those after it."""
    before = _process_state()
    yield
    after = _process_state()
    names = sorted(before.keys() | after.keys())
    changed = [
        f"{name}: {before.get(name)} -> {after.get(name)}" for name in names if before.get(name) != after.get(name)
    ]
    assert not changed


def _refuse_remote(host: object) -> None:
    own = (None, "", socket.gethostname())
    if isinstance(host, bytes):
        host = host.decode()
    if host not in own and not str(host).startswith(_LOOPBACK):
        raise RuntimeError(f"a test reached for the network: {host!r}; only the loopback is open to tests")


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """Refuse connections and name look-ups beyond this machine, with an error that no client takes for an outage."""
    connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def guarded_connect(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            _refuse_remote(address[0])
        connect(self, address)

    def guarded_connect_ex(self: socket.socket, address: Any) -> int:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            _refuse_remote(address[0])
        return connect_ex(self, address)

    def guarded_getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_remote(host)
        return getaddrinfo(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
        patch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)
        yield
