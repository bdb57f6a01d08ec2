"""Which bottlenecks the CUDA kernels take, and how a launch is cut."""

from __future__ import annotations

import pytest

_host = pytest.importorskip("peftkern._host")

SHARED = 227 * 1024  # of a block
HIDDENS = [512, 520, 1000, 1024, 2048, 4096, 4104, 5120, 8184, 8192]


def covers(M: int = 8192, hidden: int = 4096, width: int = 64, **traits: object) -> bool:
    return _host.adapter_covers(M, hidden, width, **traits)


@pytest.mark.parametrize("width", [8, 16, 24, 56, 64])
def test_widths_of_whole_vectors(width):
    assert covers(width=width)
    assert not covers(width=width + 1)
    assert not covers(width=width + 4)


@pytest.mark.parametrize("width", [0, 1, 72, 128, 256])
def test_widths_that_no_instance_holds(width):
    assert not covers(width=width)


@pytest.mark.parametrize(("M", "expected"), [(0, False), (1, True), (2**31, False), (2_000_000, True)])
def test_tokens(M, expected):
    assert covers(M=M) == expected


def test_hidden_sizes():
    assert all(covers(hidden=hidden) for hidden in HIDDENS)
    assert not any(covers(hidden=hidden) for hidden in (0, 8, 504, 513, 516, 8200, 11008))


@pytest.mark.parametrize("trait", [{"half": False}, {"aligned": False}, {"compute_capability": 80}], ids=str)
def test_what_else_goes_to_pieces(trait):
    assert not covers(**trait)


def test_blackwell_has_other_instructions():
    assert not covers(compute_capability=100)


@pytest.mark.parametrize("clusters", [1, 7, 15, 132])
@pytest.mark.parametrize("hidden", HIDDENS)
def test_tiles_and_shared_memory(hidden, clusters):
    for M in (1, 31, 32, 33, 1000, 1024, 1025, 8192, 100_001):
        c = _host.adapter_config(M, hidden, clusters)
        assert c["cluster"] in (2, 4, 8, 16)
        assert c["cluster"] * 512 >= hidden > c["cluster"] * 256 or c["cluster"] == 2
        assert c["cluster"] * c["chunks"] * 64 >= hidden
        assert min(c["cluster"], 8) * c["groups"] * 8 == 64, "each column has one owner"
        assert c["chunks"] <= 8
        assert c["shared"] <= SHARED
        assert c["slots"] >= 3, "its own residual takes two of them"
        assert c["stages"] % 2 == 0, "two warps take turns, and each must see every phase"
        assert c["tile"] <= 32
        assert c["tiles"] * c["tile"] >= M > (c["tiles"] - 1) * c["tile"]
        assert c["clusters"] == min(c["tiles"], clusters)


def test_rounds_are_even():
    c = _host.adapter_config(8192, 4096, 16)
    assert (c["cluster"], c["chunks"], c["tile"], c["tiles"]) == (8, 8, 32, 256)
    c = _host.adapter_config(8192, 4096, 15)
    assert c["tiles"] <= 18 * 15
    assert c["tile"] == 31


@pytest.mark.parametrize("multiprocessors", [78, 114, 132])
@pytest.mark.parametrize("tiles", [1, 5, 8, 33, 64, 80, 128, 344])
@pytest.mark.parametrize("M", [1, 128, 129, 1000, 8192, 50_000])
def test_gradients_have_parts_of_steps(M, tiles, multiprocessors):
    steps, parts, blocks = _host.adapter_gradient_config(M, tiles, multiprocessors)
    assert steps == -(-M // 128)
    assert 1 <= parts <= min(steps, 16)
    assert blocks == min(parts * tiles, multiprocessors)


def test_the_usual_gradients_are_one_round():
    assert _host.adapter_gradient_config(8192, 64, 132) == (64, 2, 128)
