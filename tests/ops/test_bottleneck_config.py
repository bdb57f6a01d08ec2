"""Which bottlenecks the CUDA kernels take, and how a launch is cut."""

from __future__ import annotations

import pytest

_host = pytest.importorskip("peftkern._host")

SHARED = 227 * 1024  # of a block
HIDDENS = [512, 520, 1000, 1024, 2048, 4096, 4104, 5120, 8192, 11008, 16384, 28672, 65536]


def covers(M: int = 8192, hidden: int = 4096, width: int = 64, **traits: object) -> bool:
    return _host.adapter_covers(M, hidden, width, **traits)


@pytest.mark.parametrize("width", [8, 16, 24, 64, 72, 128])
def test_widths_of_whole_vectors(width):
    assert covers(width=width)
    assert not covers(width=width + 1)
    assert not covers(width=width + 4)


@pytest.mark.parametrize("width", [0, 1, 136, 256])
def test_widths_that_no_instance_holds(width):
    assert not covers(width=width)


@pytest.mark.parametrize(("M", "expected"), [(0, False), (1, True), (2**31, False), (2_000_000, True)])
def test_tokens(M, expected):
    assert covers(M=M) == expected


def test_hidden_sizes():
    assert all(covers(hidden=hidden) for hidden in HIDDENS)
    assert not any(covers(hidden=hidden) for hidden in (0, 8, 504, 513, 516, 65544))


@pytest.mark.parametrize("trait", [{"half": False}, {"aligned": False}, {"compute_capability": 80}], ids=str)
def test_what_else_goes_to_pieces(trait):
    assert not covers(**trait)


def test_blackwell_has_other_instructions():
    assert not covers(compute_capability=100)


@pytest.mark.parametrize("own_residual", [False, True])
@pytest.mark.parametrize(("tokens", "teams"), [(0, 0), (64, 1), (64, 2), (128, 1)], ids=str)
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("hidden", HIDDENS)
def test_shared_memory_holds_a_tile(hidden, width, tokens, teams, own_residual):
    for M in (1, 63, 64, 65, 1000, 1024, 1025, 8192, 100_001):
        c = _host.adapter_config(M, hidden, width, own_residual, tokens=tokens, teams=teams)
        if teams == 2 and c["tokens"] == 0:
            continue
        assert c["tokens"] == tokens or (tokens == 0 and c["tokens"] in (64, 128))
        assert c["teams"] == teams or (teams == 0 and c["teams"] in (1, 2))
        assert c["shared"] <= SHARED
        assert min(c["x_slots"], c["w_slots"]) >= 2
        assert max(c["x_slots"], c["w_slots"]) <= 16
        assert 8 * 64 * c["chunks"] >= hidden
        assert c["tile"] <= c["tokens"]
        assert c["tile"] % 8 == 0
        assert c["tiles"] * c["tile"] >= M > (c["tiles"] - 1) * c["tile"]
        assert c["clusters"] == min(c["tiles"], 15)
        if c["keeps_x"]:
            assert not own_residual
            assert c["x_slots"] >= c["chunks"]
        if c["teams"] == 2:
            assert c["keeps_x"], "a tile waits for slots that its own residual would need"


@pytest.mark.parametrize(("hidden", "taken"), [(512, True), (4096, True), (4104, False), (8192, False)])
def test_two_teams_where_both_tiles_fit(hidden, taken):
    assert (_host.adapter_config(8192, hidden, 64, teams=2)["tokens"] != 0) == taken
    assert _host.adapter_config(8192, hidden, 128, teams=2)["tokens"] == 0


def test_the_usual_adapter_has_five_even_rounds_of_tiles():
    c = _host.adapter_config(8192, 4096, 64)
    assert (c["tokens"], c["teams"], c["tile"], c["tiles"], c["keeps_x"]) == (64, 2, 56, 147, True)
    assert c["tiles"] <= 5 * 15 * 2


@pytest.mark.parametrize("hidden", [4608, 8192])
def test_wider_hidden_sizes_read_x_once_too(hidden):
    assert _host.adapter_config(8192, hidden, 64)["keeps_x"]


@pytest.mark.parametrize("M", [1, 64, 512])
def test_few_tokens_have_both_warpgroups_on_a_tile(M):
    c = _host.adapter_config(M, 4096, 64)
    assert (c["tokens"], c["teams"]) == (64, 1)
    assert c["tiles"] <= 15


@pytest.mark.parametrize("multiprocessors", [78, 114, 132])
@pytest.mark.parametrize("tiles", [1, 5, 8, 33, 64, 80, 128, 344])
@pytest.mark.parametrize("M", [1, 128, 129, 1000, 8192, 50_000])
def test_gradients_have_parts_of_steps(M, tiles, multiprocessors):
    steps, parts, blocks = _host.adapter_gradient_config(M, 128, tiles, multiprocessors)
    assert steps == -(-M // 128)
    assert 1 <= parts <= min(steps, 16)
    assert blocks == min(parts * tiles, multiprocessors)


def test_the_usual_gradients_are_one_round():
    assert _host.adapter_gradient_config(8192, 128, 64, 132) == (64, 2, 128)
