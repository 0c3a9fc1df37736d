from pathlib import Path

import numpy as np
import pytest

from twotower.index import exact
from twotower.index.exact import ExactIndex
from twotower.schema.errors import DataError


def test_equal_vectors_have_equal_scores_wherever_they_stand_and_whatever_the_batch() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(1003, 33)).astype(np.float32)
    copies = rng.permutation(1003)[:400]
    vectors[copies] = vectors[copies[0]]
    queries = vectors[copies[:1]] + rng.normal(size=(20, 33)).astype(np.float32) / 10
    index = ExactIndex.build(np.arange(1003), vectors)
    together = index.search(queries, 300)
    for b in range(20):
        alone = index.search(queries[b : b + 1], 300)
        np.testing.assert_array_equal(alone.rows[0], together.rows[b])
        np.testing.assert_array_equal(alone.scores[0], together.scores[b])
        tied = together.rows[b][np.isin(together.rows[b], copies)]
        assert tied.tolist() == sorted(copies.tolist())[: len(tied)]
        assert len(tied) > 0


def test_pieces_of_queries_and_of_ties_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = np.tile(np.array([[1, 2, 3], [3, 2, 1]], np.float32), (50, 1))
    index = ExactIndex.build(np.arange(100), vectors)
    whole = index.search(vectors[:7], 60)
    monkeypatch.setattr(exact, "SCORES_AT_ONCE", 250)
    monkeypatch.setattr(exact, "RESCORED_AT_ONCE", 7)
    pieces = index.search(vectors[:7], 60)
    np.testing.assert_array_equal(whole.rows, pieces.rows)
    first, second = [*range(0, 100, 2)], [*range(1, 100, 2)]
    assert pieces.rows[0].tolist() == first + second[:10]


def test_a_loaded_index_is_mapped_and_cannot_be_written(tmp_path: Path) -> None:
    ExactIndex.build(np.arange(3), np.ones((3, 2), np.float32)).save(tmp_path / "index")
    loaded = ExactIndex.load(tmp_path / "index")
    assert isinstance(loaded._vectors, np.memmap)
    assert not loaded._vectors.flags.writeable


@pytest.mark.parametrize("name", ["vectors.npy", "rows.npy"])
def test_a_damaged_file_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "index"
    ExactIndex.build(np.arange(30), np.ones((30, 2), np.float32)).save(folder)
    content = (folder / name).read_bytes()
    for damaged in (b"", b"garbage" * 40, content[:60], content[:-1]):
        (folder / name).write_bytes(damaged)
        with pytest.raises(DataError, match=f"{name} cannot be read"):
            ExactIndex.load(folder)
    (folder / name).unlink()
    with pytest.raises(DataError, match=f"{name} does not exist"):
        ExactIndex.load(folder)


def test_an_array_of_another_index_is_refused(tmp_path: Path) -> None:
    ExactIndex.build(np.arange(3), np.ones((3, 2), np.float32)).save(tmp_path / "one")
    ExactIndex.build(np.arange(4), np.ones((4, 2), np.float32)).save(tmp_path / "other")
    (tmp_path / "other" / "rows.npy").rename(tmp_path / "one" / "rows.npy")
    with pytest.raises(DataError, match=r"holds int64\(4,\) where index.json says int64\(3,\)"):
        ExactIndex.load(tmp_path / "one")
