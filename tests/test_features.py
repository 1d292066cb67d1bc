"""Side features: which columns are features, of which kind, in which rows."""

import json

import numpy as np
import pandas as pd
import pytest

from metarec_jax import cli
from metarec_jax.core import MetarecError
from metarec_jax.data.interactions import Interactions
from metarec_jax.data.io.cache import read_cache, write_cache
from metarec_jax.data.io.readers import from_pandas, read
from metarec_jax.serving.history import feature_columns


def items(**columns) -> Interactions:
    n = len(next(iter(columns.values())))
    frame = pd.DataFrame({"user": np.arange(n) % 2, "item": np.arange(n), "rating": np.arange(n) % 5})
    return from_pandas(frame, item_features=pd.DataFrame({"item": np.arange(n), **columns}))


def test_kinds_of_features():
    n = 60
    many = np.arange(n) * 3
    data = items(
        few=np.arange(n) % 4,
        many=many,
        real=np.linspace(0, 1, n),
        color=["red", "blue"] * (n // 2),
        flag=[True, False] * (n // 2),
        tags=[["b", "a"], ["a"]] * (n // 2),
        bars=["x|y", "y"] * (n // 2),
        item_kind=pd.Categorical(list("ab") * (n // 2)),
        when=pd.date_range("2020-01-01", periods=n),
        text=[f"review {k}" for k in range(n)],
        zip_code=np.arange(n) + 10_000,
        constant=[1] * n,
        title=[f"T{k}" for k in range(n)],
    )
    kinds = {name: f.kind for name, f in data.item_features.items()}
    assert kinds == {
        **{f"item_{name}": "categorical" for name in ("few", "color", "flag", "kind")},
        **{f"item_{name}": "numeric" for name in ("many", "real", "when")},
        **{f"item_{name}": "multi" for name in ("tags", "bars")},
    }
    scaled = (many - many.mean()) / many.std()
    np.testing.assert_allclose(data.item_features["item_many"].values[1:, 0], scaled, rtol=1e-6)
    assert data.item_features["item_many"].values[0, 0] == 0
    assert data.item_features["item_color"].vocabulary.ids.tolist() == ["blue", "red"]
    assert data.item_features["item_tags"].values[:3].tolist() == [[0, 0], [2, 1], [1, 0]]
    assert data.titles[7] == "T7"
    for name in ("text", "zip_code"):
        assert f"item column {name!r} differs on most rows, like a label: not a feature" in data.notes
    assert "item column 'constant' has the same value in every row: not a feature" in data.notes


def test_missing_features_are_the_unknown_value():
    data = items(real=[1.5, np.nan, 2.5, 3.5], color=["a", None, "", "b"], tags=[["x"], None, [], ["y", "x"]])
    real = data.item_features["item_real"].values[:, 0]
    np.testing.assert_allclose(real, [0, -np.sqrt(1.5), 0, 0, np.sqrt(1.5)], rtol=1e-6)  # mean 2.5, std sqrt(2/3)
    assert data.item_features["item_color"].values.tolist() == [0, 1, 0, 0, 2]
    assert data.item_features["item_tags"].values.tolist() == [[0, 0], [1, 0], [0, 0], [0, 0], [2, 1]]


def test_long_lists_are_cut_and_that_is_said():
    data = items(tags=[[str(k) for k in range(40)], ["1"], ["2"]])
    assert data.item_features["item_tags"].values.shape == (4, 32)
    assert "item column 'tags' has up to 40 values per row: the first 32 are kept (1 rows truncated)" in data.notes


def test_feature_rows_are_matched_by_id():
    frame = pd.DataFrame({"user": ["1", "2", "3"], "item": [1, 2, 3], "rating": [1, 2, 3]})
    about = pd.DataFrame({"user": [2, 9, 1, 2], "job": ["cook", "none", "pilot", "clerk"]})
    data = from_pandas(frame, user_features=about)
    job = data.user_features["user_job"]
    assert job.vocabulary.ids.tolist() == ["clerk", "pilot"]
    assert job.values.tolist() == [0, 2, 1, 0]
    assert "1 users of the user table have no interaction: dropped" in data.notes
    assert "1 repeated user ids in the user table: the last row is used" in data.notes
    assert "1 users have no row in the user table: their features are unknown" in data.notes
    with pytest.raises(MetarecError, match=r"no id in column 'user' of the user table .* is among"):
        from_pandas(frame, user_features=about.assign(user=77))
    with pytest.raises(MetarecError, match="no column of user ids; its columns are: job"):
        from_pandas(frame, user_features=about[["job"]])


def test_the_order_of_rows_changes_no_vocabulary():
    frame = pd.DataFrame({"user": [3, 1, 2], "item": ["c", "a", "b"], "rating": [1, 2, 3]})
    about = pd.DataFrame({"item": ["c", "a", "b"], "kind": ["z", "y", "y"]})
    one, two = (from_pandas(f, item_features=a) for f, a in ((frame, about), (frame[::-1], about[::-1])))
    assert one.users.ids.tolist() == two.users.ids.tolist() == [1, 2, 3]
    assert one.items.ids.tolist() == two.items.ids.tolist() == ["a", "b", "c"]
    assert one.item_features["item_kind"].values.tolist() == two.item_features["item_kind"].values.tolist()


def test_numbers_of_a_new_user_are_standardised_as_those_read(tmp_path):
    """Also from a cache, as a run has it: what a known user's row says, a new user of the same age gets."""
    ages = np.linspace(20.5, 70.0, 60)
    frame = pd.DataFrame({"user": np.arange(60), "item": np.arange(60) % 7, "rating": np.arange(60) % 5})
    data = from_pandas(frame, user_features=pd.DataFrame({"user": np.arange(60), "age": ages}))
    write_cache(data, tmp_path / "data.parquet")
    read = read_cache(tmp_path / "data.parquet")
    row = int(data.users.encode([17])[0])
    for one in (data, read):
        columns, _ = feature_columns({"age": float(ages[17])}, one)
        np.testing.assert_allclose(columns["user_age"][0], data.user_features["user_age"].values[row], rtol=1e-6)


GENRES = ["Action", "Comedy", "Drama", "Music", "War"]
SETS = [[g for k, g in enumerate(GENRES) if n >> k & 1] for n in (1, 2, 3, 6, 8, 9, 12, 16, 24, 31)]


@pytest.mark.parametrize(
    ("spelled", "said"),
    [
        (", ".join, "separated by ','"),
        (",".join, "separated by ','"),
        (";".join, "separated by ';'"),
        ("; ".join, "separated by ';'"),
        ("/".join, "separated by '/'"),
        (" / ".join, "separated by '/'"),
        (repr, "written as a list"),
        (lambda row: str(np.array(row, object)), "written as a list"),
        (lambda row: json.dumps(row), "written as a list"),
        (lambda row: json.dumps([{"id": 80 + GENRES.index(g), "name": g} for g in row]), "written as a list"),
        (lambda row: repr([{"id": 80 + GENRES.index(g), "name": g} for g in row]), "written as a list"),
        (lambda row: "{" + ",".join(row) + "}", "written as a list"),
    ],
)
def test_lists_in_text_are_split_and_that_is_said(spelled, said):
    """Ten items with sets of five genres, as 'a|b' would be read; an item without any stays without."""
    data = items(genre=[*map(spelled, SETS), None])
    feature = data.item_features["item_genre"]
    assert (feature.kind, feature.vocabulary.ids.tolist()) == ("multi", GENRES)
    assert [[GENRES[v - 1] for v in row if v] for row in feature.values[1:].tolist()] == [*SETS, []]
    assert f"item column 'genre' is {said}: split into its values" in data.notes


def test_lists_of_objects_and_of_numbers():
    """As JSON and Parquet hold them: objects by their names; and the numbers of genres, parted by commas."""
    numbered = [",".join(str(k + 7) for k, g in enumerate(GENRES) if g in row) for row in SETS]
    data = items(
        genre=[[{"id": 80, "name": g} for g in row] for row in SETS], nested=[[row] for row in SETS], number=numbered
    )
    for name in ("genre", "nested"):
        feature = data.item_features[f"item_{name}"]
        assert [[GENRES[v - 1] for v in row if v] for row in feature.values[1:].tolist()] == SETS
    number = data.item_features["item_number"]
    assert [[number.vocabulary.ids[v - 1] for v in row if v] for row in number.values[1:].tolist()] == [
        text.split(",") for text in numbered
    ]


def test_text_that_is_no_list_stays_whole():
    """Places, names, descriptions, dates and fractions hold the same signs."""
    n = 24
    data = items(
        place=[f"{city}, {land}" for city, land in [("Lyon", "France"), ("Nice", "France"), ("Bonn", "Germany")] * 8],
        author=[f"{['Kubrick', 'Lee', 'Scott'][k % 3]}, {['Stanley', 'Ang', 'Ridley'][k % 3]}" for k in range(n)],
        job=["academic/educator", "clerical/admin", "tradesman/craftsman"] * 8,
        day=["11/01/1970", "12/01/1970", "01/12/1970"] * 8,
        size=["1,5", "2,5", "5,1"] * 8,
        votes=["1,234,500", "500,234", "234,500"] * 8,
        text=[f"A film, number {k}, and long" for k in range(n)],
    )
    kinds = {name: f.kind for name, f in data.item_features.items()}
    assert kinds == {f"item_{name}": "categorical" for name in ("place", "author", "job", "day", "size", "votes")}


def test_vectors_in_text_are_numbers():
    data = items(vector=["[0.5, 1]", "[0, 3]", "[0.5 2.0]"])
    assert data.item_features["item_vector"].values.shape == (4, 2)
    assert data.item_features["item_vector"].kind == "numeric"


def test_iso_dates_in_text_are_dates(tmp_path):
    """As pandas' dates are: days, standardised."""
    days = pd.date_range("1999-12-30", periods=30, freq="37D")
    spelled = [f"{d:%Y-%m-%d}" for d in days]
    want = items(when=days).item_features["item_when"].values
    data = items(when=[*spelled[:10], *(f"{d}T00:00:00Z" for d in spelled[10:])])
    assert data.item_features["item_when"].values.tolist() == want.tolist()
    assert "item column 'when' is read as dates" in data.notes
    broken = items(when=[*spelled[:-1], "1999-13-45"])
    assert "item_when" not in broken.item_features


def test_na_among_codes_of_two_letters_is_a_value(tmp_path):
    """Namibia, or North America; among other text it is a missing value."""
    codes = ["NA", "US", "DE", "NA", "US"]
    data = items(country=codes, kind=["NA", "film", "serial", "NA", "film"], number=["NA", "1", "2", "NA", "3"])
    country = data.item_features["item_country"]
    assert country.vocabulary.ids.tolist() == ["DE", "NA", "US"]
    assert data.item_features["item_kind"].vocabulary.ids.tolist() == ["film", "serial"]
    assert "item column 'country': 'NA' is read as a value, like the other two-letter codes" in data.notes
    ratings, table = tmp_path / "a.csv", tmp_path / "items.csv"
    pd.DataFrame({"user": [0, 1, 0, 1, 0], "item": range(5), "rating": range(5)}).to_csv(ratings, index=False)
    pd.DataFrame({"item": range(5), "country": codes, "n": ["NA", 1, 2, "NA", 3]}).to_csv(table, index=False)
    read_back = read(ratings, item_features=table)
    assert read_back.item_features["item_country"].values.tolist() == country.values.tolist()
    assert read_back.item_features["item_n"].vocabulary.ids.tolist() == [1, 2, 3]


def test_long_names_of_features_stand_apart(tmp_path, capsys):
    ratings, table = tmp_path / "a.csv", tmp_path / "items.csv"
    pd.DataFrame({"user": [0, 1], "item": [1, 2], "rating": [1, 2]}).to_csv(ratings, index=False)
    pd.DataFrame({"item": [1, 2], "a_name_of_many_letters": ["x", "y"]}).to_csv(table, index=False)
    assert cli.main(["data", str(ratings), "--item-features", str(table)]) == 0
    assert "item_a_name_of_many_letters  categorical, 2 values" in capsys.readouterr().out
