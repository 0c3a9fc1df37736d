from collections import Counter

import pytest

from twotower.logs import partition_of


def test_partitions_are_the_same_on_every_machine() -> None:
    assert [partition_of(user_id, 1000) for user_id in (0, 1, -1, 2**63 - 1, "1", "ü")] == [
        135,
        704,
        306,
        850,
        910,
        803,
    ]


def test_one_partition_holds_all() -> None:
    assert {partition_of(user_id, 1) for user_id in range(100)} == {0}


@pytest.mark.parametrize("partitions", [2, 3, 4, 7, 16])
@pytest.mark.parametrize("stride", [1, 16])
def test_users_spread_evenly(partitions: int, stride: int) -> None:
    for users in (range(0, 1000 * partitions * stride, stride), map(str, range(1000 * partitions))):
        counts = Counter(partition_of(user_id, partitions) for user_id in users)
        assert len(counts) == partitions
        assert 900 < min(counts.values()) <= max(counts.values()) < 1100
