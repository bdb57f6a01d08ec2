"""When a weight counts as settled: seen before, and not written since."""

import copy
import pickle

import pytest
import torch

from peftkern import NF4Linear, nf4_matmul, quantize_nf4
from peftkern.ops.nf4 import function
from peftkern.ops.nf4.settled import Settled


@pytest.fixture
def q():
    return quantize_nf4(torch.randn(64, 128))


def settles(watch: Settled, tensors) -> list[bool]:
    return [watch.check(tensors) for _ in range(3)]


def test_a_weight_settles_with_its_first_multiplication(q):
    assert settles(Settled(), q.tensors()) == [False, True, True]


@pytest.mark.parametrize("piece", range(5))
def test_a_write_to_any_piece_unsettles(q, piece):
    watch = Settled()
    settles(watch, q.tensors())
    q.tensors()[piece].mul_(1)
    assert settles(watch, q.tensors()) == [False, True, True]


@pytest.mark.parametrize("piece", range(5))
def test_a_replaced_piece_unsettles_even_at_the_same_address_and_version(q, piece):
    watch = Settled()
    settles(watch, q.tensors())
    tensors = list(q.tensors())
    tensors[piece] = tensors[piece].detach()  # another tensor over the same bytes, with the same count of writes
    assert settles(watch, tensors) == [False, True, True]


def test_pieces_without_double_quantization_are_other_pieces(q):
    watch = Settled()
    settles(watch, q.tensors())
    assert settles(watch, (*q.tensors()[:2], None, None, None)) == [False, True, True]


def test_inference_tensors_never_settle():
    with torch.inference_mode():
        q = quantize_nf4(torch.randn(64, 128))
        assert settles(Settled(), q.tensors()) == [False, False, False]


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda w: pickle.loads(pickle.dumps(w))])
def test_a_copy_has_settled_nothing(q, copied):
    watch = Settled()
    settles(watch, q.tensors())
    assert not copied(watch).check(q.tensors())
    settles(q.settled, q.tensors())
    other = copied(q) if copied is not copy.copy else q.clone()
    assert not other.settled.check(other.tensors())


def test_the_watch_keeps_no_weight_alive(q):
    watch = Settled()
    tensors = [t.clone() for t in q.tensors()]
    settles(watch, tensors)
    refs = watch._tensors
    del tensors
    assert all(ref() is None for ref in refs)


class Recorder:
    """Stands in for the op and keeps what it was told."""

    def __init__(self, op):
        self.op, self.settled = op, []

    def __call__(self, *args):
        self.settled.append(args[-1])
        return self.op(*args)


@pytest.fixture
def told(monkeypatch):
    recorder = Recorder(torch.ops.peftkern.nf4_matmul)
    monkeypatch.setattr(torch.ops.peftkern, "nf4_matmul", recorder)
    return recorder.settled


def test_the_function_tells_the_op(q, told):
    x = torch.randn(2, 128)
    nf4_matmul(x, q), nf4_matmul(x, q)
    q.packed.zero_()
    nf4_matmul(x, q), nf4_matmul(x, q)
    assert told == [False, True, False, True]
    assert function._ops is torch.ops.peftkern


def test_the_module_tells_the_op(told):
    layer = NF4Linear(128, 64)
    x = torch.randn(2, 128)
    with torch.no_grad():
        layer(x), layer(x)
        layer.load_state_dict(layer.state_dict())
        layer(x), layer(x)
        copied = copy.deepcopy(layer)
        copied(x), copied(x)
    assert told == [False, True] * 3


def test_an_empty_input_launches_nothing_and_settles_nothing(q, told):
    empty, x = torch.randn(0, 128), torch.randn(2, 128)
    nf4_matmul(empty, q), nf4_matmul(x, q), nf4_matmul(x, q)
    assert told == [False, False, True]
