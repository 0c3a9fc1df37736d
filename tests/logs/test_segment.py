import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twotower.logs.partition import digest
from twotower.logs.protocol import MAX_PAYLOAD_BYTES
from twotower.logs.segment import encode, read_ids, walk, write_ids


def payloads(path: Path, position: int = 0) -> list[bytes]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return [stored.payload for stored in walk(descriptor, position)]
    finally:
        os.close(descriptor)


def test_a_record_is_length_checksum_payload() -> None:
    # CRC-32C of 02 00 00 00 7b 7d, by a bit-wise implementation of the Castagnoli polynomial
    checksum = 0xFFFFFFFF
    for byte in b"\x02\0\0\0{}":
        checksum ^= byte
        for _ in range(8):
            checksum = (checksum >> 1) ^ (0x82F63B78 if checksum & 1 else 0)
    assert encode(b"{}") == b"\x02\0\0\0" + (checksum ^ 0xFFFFFFFF).to_bytes(4, "little") + b"{}"


def test_records_larger_than_what_is_read_at_once_come_whole(tmp_path: Path) -> None:
    sent = [bytes([65 + n]) * size for n, size in enumerate([1, 300_000, 2, 1_000_000, 262_144 - 8, 262_144, 3])]
    (tmp_path / "s").write_bytes(b"".join(map(encode, sent)))
    assert payloads(tmp_path / "s") == sent


def test_many_small_records_come_whole_across_the_edges_of_what_is_read_at_once(tmp_path: Path) -> None:
    sent = [b"%d" % n * (1 + n % 13) for n in range(20_000)]
    (tmp_path / "s").write_bytes(b"".join(map(encode, sent)))
    assert payloads(tmp_path / "s") == sent


def test_zeros_are_no_record(tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(encode(b"{}") + bytes(100_000))
    assert payloads(tmp_path / "s") == [b"{}"]


def test_an_empty_record_is_not_valid(tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(encode(b"") + encode(b"{}"))
    assert payloads(tmp_path / "s") == []


def test_a_length_beyond_the_largest_event_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes((MAX_PAYLOAD_BYTES + 1).to_bytes(4, "little") + bytes(4) + b"x")
    assert payloads(tmp_path / "s") == []


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=6), st.data())
def test_any_damage_gives_a_prefix_of_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, sent: list[bytes], data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged"
    content = bytearray(b"".join(map(encode, sent)))
    if content:
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] ^= data.draw(st.integers(1, 255))
        del content[data.draw(st.integers(at + 1, len(content))) :]
    path.write_bytes(content)
    found = payloads(path)
    assert found == sent[: len(found)]
    assert len(found) < len(sent) or not sent


def test_an_id_is_told_by_user_and_event() -> None:
    names = {digest("e", 1), digest("e", "1"), digest("e", 2), digest("f", 1), digest("", "1e"), digest("1", "e")}
    assert len(names) == 6
    assert digest("e", 1) == digest("e", 1)


def test_ids_are_found_at_their_offsets(tmp_path: Path) -> None:
    known = {digest(f"e{n}", n): n * 10 for n in range(2000)}
    known |= {bytes(16): 1, b"\1" + bytes(15): 2, b"\xff" * 16: 3, b"\0" * 15 + b"\1": 4}  # zeros at either end
    ids = write_ids(tmp_path / "s.ids", known)
    assert ids.find(list(known)).tolist() == list(known.values())
    assert ids.find([digest("other", n) for n in range(100)] + [b"\2" + bytes(15)]).tolist() == [-1] * 101


def test_damaged_ids_are_none(tmp_path: Path) -> None:
    path = tmp_path / "s.ids"
    assert read_ids(path) is None
    write_ids(path, {digest("a", 1): 0, digest("b", 1): 50})
    whole = path.read_bytes()
    for at in [*range(12), *range(16, len(whole))]:  # 12 to 15 are padding
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert read_ids(path) is None, at
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert read_ids(path) is None, length
