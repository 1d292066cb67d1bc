"""Vocabularies: every way in which people write an id finds its row."""

import numpy as np
import pandas as pd
import pytest

from metarec_jax.data.interactions import Interactions, Vocabulary


def test_integer_ids_are_found_as_numbers_and_as_text():
    v = Vocabulary(np.array([10, 20, 2**60]))
    assert v.encode([20, 10, 30]).tolist() == [2, 1, 0]
    assert v.encode(["20", " 10", "x", "20.0", "20.5", ""]).tolist() == [2, 1, 0, 2, 0, 0]
    assert v.encode([20.0, np.nan, np.inf, 20.5]).tolist() == [2, 0, 0, 0]
    # 2**60 + 1 rounds to 2**60 as a float: text must not go through one
    assert v.encode([str(2**60), str(2**60 + 1)]).tolist() == [3, 0]
    assert v.encode(np.array([10, None, "20"], dtype=object)).tolist() == [1, 0, 2]
    assert v.encode(np.array([2**63 + 10, 10], np.uint64)).tolist() == [0, 1]


def test_text_ids_are_found_by_the_number_they_spell_and_keep_leading_zeros():
    v = Vocabulary(np.array(["007", "12", "nan", "a"], dtype=object))
    assert v.encode([12, 7]).tolist() == [2, 0]
    assert v.encode(["007", "a", "7"]).tolist() == [1, 4, 0]
    assert v.encode([12.0, np.nan]).tolist() == [2, 0]  # a missing value is not the id "nan"
    assert v.encode(np.array(["a", None, 12, np.nan], dtype=object)).tolist() == [4, 0, 2, 0]
    assert v.encode(pd.Series(["a", "12"])).tolist() == [4, 2]
    assert v.encode([["a", "12"], ["x", "007"]]).tolist() == [[4, 2], [0, 1]]


def test_decode_is_the_inverse_of_encode_and_refuses_other_rows():
    v = Vocabulary(np.array(["b", "a"]))
    assert v.decode(v.encode(["a", "b"])).tolist() == ["a", "b"]
    assert v.num_rows == 3
    for rows in ([0], [3], [-1]):
        with pytest.raises(IndexError, match=r"1\.\.2"):
            v.decode(rows)


def test_no_ids_and_no_values():
    assert Vocabulary(np.array(["a"])).encode([]).tolist() == []
    assert Vocabulary(np.array([], dtype=object)).encode(["a", 1]).tolist() == [0, 0]
    assert Vocabulary(np.array([1])).encode(np.array([], dtype=object)).tolist() == []


def test_take_keeps_vocabularies_whole():
    ids = Vocabulary(np.array([1, 2]))
    two = np.array([1, 2], np.int32)
    data = Interactions(two, two, None, np.array([5, 6]), ids, ids)
    taken = data.take(np.array([False, True]))
    assert (len(taken), taken.user.tolist(), taken.timestamp.tolist(), taken.users is ids) == (1, [2], [6], True)
    assert taken.implicit
