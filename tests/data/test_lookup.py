"""mclip.data.stores.lookup: a number for each of many keys, found in a mapped file."""

import os

import numpy as np
import pytest

from mclip.data.stores import lookup


def made(folder, keys, values=None, pieces=3):
    source = folder / "table"
    source.write_text("x")
    values = np.arange(len(keys)) if values is None else np.asarray(values)
    parts = list(
        zip(
            np.array_split(np.asarray(keys, str), pieces),
            np.array_split(values, pieces),
            strict=True,
        )
    )
    return lookup.make(folder / "cache", "some", source, lambda: iter(parts))


def test_finds_what_a_dict_finds(tmp_path):
    rng = np.random.default_rng(0)
    keys = [f"{x:09d}" for x in rng.choice(10**9, 5000, replace=False)]
    values = rng.integers(0, 2**40, len(keys))
    table = made(tmp_path, keys[:4000], values[:4000])
    known = dict(zip(keys[:4000], values[:4000].tolist(), strict=True))
    asked = [keys[i] for i in rng.integers(0, 5000, 3000)]
    assert len(table) == 4000
    assert table.find(asked).tolist() == [known.get(key, -1) for key in asked]
    assert (
        table.find([]).tolist() == []
        and table.find(np.array(asked)).tolist() == table.find(asked).tolist()
    )


def test_numbers_and_their_names_are_one_key(tmp_path):
    assert made(tmp_path, [7, 12, 3], [0, 1, 2]).find([3, "12"]).tolist() == [2, 1]


@pytest.mark.parametrize("asked", [["a"], []])
def test_an_empty_table(tmp_path, asked):
    assert made(tmp_path, []).find(asked).tolist() == [-1] * len(asked)


def test_a_key_twice_is_told_and_nothing_is_left(tmp_path):
    with pytest.raises(lookup.KeysError, match="table: a key is there twice"):
        made(tmp_path, ["a", "b", "a"])
    assert not list((tmp_path / "cache").glob("*.npy"))


def test_made_once_and_anew_when_the_table_was_written_again(tmp_path):
    source, calls = tmp_path / "table", []
    source.write_text("x")

    def pieces():
        calls.append(1)
        yield np.array(["a"]), np.array([len(calls)])

    assert [lookup.make(tmp_path, "n", source, pieces).find(["a"])[0] for _ in range(2)] == [1, 1]
    os.utime(source, ns=(1, 1))
    assert lookup.make(tmp_path, "n", source, pieces).find(["a"])[0] == 2
