"""Launch configurations of the CUDA AdamW step."""

from __future__ import annotations

import pytest

from peftkern.ops.adamw8bit.op import TABLE_WORDS

_host = pytest.importorskip("peftkern._host")


@pytest.mark.parametrize("numel", [1, 255, 8192, 8193, 65536, 2**30, 2**30 + 1, 5 * 2**30 + 7])
def test_chunks_and_entries_cover_a_tensor(numel: int) -> None:
    chunks, entries = _host.adamw8bit_chunks(numel)
    assert (chunks - 1) * 8192 < numel <= chunks * 8192
    assert (entries - 1) * 2**30 < numel <= entries * 2**30


def test_nothing_of_nothing() -> None:
    assert _host.adamw8bit_chunks(0) == (0, 0)


@pytest.mark.parametrize(
    ("numel", "aligned", "blocks", "kinds"),
    [
        (3 * 8192, True, True, (6, 6)),
        (3 * 8192, True, False, (2, 2)),
        (3 * 8192, False, True, (0, 0)),
        # Copies are of 16 bytes, four scales: one that is not full is copied where it has whole fours of blocks.
        (3 * 8192 + 1024, True, True, (6, 14)),
        (8192 - 1024, True, True, (6, 14)),
        (3 * 8192 + 768, True, True, (6, 0)),
        (3 * 8192 + 1025, True, True, (6, 0)),
        (3 * 8192 + 1024, True, False, (2, 0)),
        (3 * 8192 + 1024, False, True, (0, 0)),
        (2**30, True, True, (6, 6)),
    ],
)
def test_only_what_can_be_copied_is(numel: int, aligned: bool, blocks: bool, kinds: tuple[int, int]) -> None:
    assert _host.adamw8bit_kinds(numel, aligned, blocks) == kinds


@pytest.mark.parametrize("chunks", [1, 131, 132, 133, 10**6])
def test_one_block_of_a_multiprocessor(chunks: int) -> None:
    ctas, _, _ = _host.adamw8bit_step_config(chunks, 132)
    assert ctas == min(chunks, 132)
    assert _host.adamw8bit_look_ctas(chunks, 132, False) == min(chunks, 528)
    assert _host.adamw8bit_look_ctas(chunks, 132, True) == min(chunks, 264)


@pytest.mark.parametrize(
    ("major", "limit", "staged"), [(9, 232448, True), (10, 232448, True), (8, 166912, False), (12, 101376, False)]
)
def test_tables_and_stages_fit_into_shared_memory(major: int, limit: int, staged: bool) -> None:
    _, copies, shared = _host.adamw8bit_step_config(1000, 108, major, limit)
    assert copies == staged
    assert shared + 4096 <= limit


def test_the_fake_kernel_knows_the_size_of_the_tables() -> None:
    assert _host.adamw8bit_table_words() == TABLE_WORDS
