"""Page-locked memory, over a stand-in for the driver and on a GPU."""

from __future__ import annotations

import gc
import os

import pytest
import torch

from peftkern.optim import pinned


class Driver:
    """Notes what is registered."""

    def __init__(self, status: int = 0) -> None:
        self.status = status
        self.held: dict[int, int] = {}

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        if not self.status:
            self.held[address] = nbytes
        return self.status

    def cudaHostUnregister(self, address: int) -> int:
        del self.held[address]
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    monkeypatch.setattr(pinned, "_cudart", lambda: driver)
    return driver


def test_memory_is_unregistered_with_its_last_view(driver: Driver) -> None:
    before = pinned.pinned_bytes()
    memory = pinned.pin(1 << 20, torch.device("cpu"))
    assert driver.held == {memory.data_ptr(): 1 << 20}
    assert pinned.pinned_bytes() == before + (1 << 20)
    assert memory.numel() == 1 << 20
    assert not memory.any()
    view = memory[100:300].view(torch.float32)
    del memory
    gc.collect()
    assert len(driver.held) == 1
    view.fill_(3.0)
    del view
    gc.collect()
    assert not driver.held
    assert pinned.pinned_bytes() == before


def test_a_forked_child_leaves_it_registered(driver: Driver) -> None:
    memory = pinned.pin(4096, torch.device("cpu"))
    child = os.fork()
    if child == 0:
        del memory
        gc.collect()
        os._exit(len(driver.held))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert len(driver.held) == 1


def test_refusals_say_why(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.status = 2
    with pytest.raises(pinned.PinningError, match="cudaHostRegister of 4096 bytes failed with error 2"):
        pinned.pin(4096, torch.device("cpu"))
    monkeypatch.setattr(pinned, "available_memory", lambda: 1 << 20)
    with pytest.raises(pinned.PinningError, match="1000000 bytes are wanted and 1048576 available"):
        pinned.pin(1_000_000, torch.device("cpu"))
    monkeypatch.setattr(pinned, "available_memory", lambda: None)
    with pytest.raises(pinned.PinningError, match=r"mapping .* bytes failed"):
        pinned.pin(1 << 62, torch.device("cpu"))


def test_available_memory_is_the_tightest_limit() -> None:
    assert pinned._meminfo("MemTotal: 9 kB\nMemAvailable:    1024 kB\n") == 1 << 20
    assert pinned._meminfo("") is None
    assert pinned._cgroup("1000\n", "700\n", "anon 600\ninactive_file 50\n") == 350
    assert pinned._cgroup("max\n", "700\n", "") is None
    assert pinned._cgroup("", "", "") is None
    assert (pinned.available_memory() or 1) > 0


def test_on_a_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    memory = pinned.pin(1 << 20, device)
    assert memory.is_pinned()
    memory.copy_(torch.arange(1 << 20, device=device).to(torch.uint8), non_blocking=True)
    torch.cuda.synchronize()
    assert int(memory[255]) == 255
