"""Your own table, with side features; an unrated item is recommended by its content."""

import jax
import numpy as np
import pandas as pd

import metarec_jax as mr

rng = np.random.default_rng(0)
books = pd.DataFrame(
    {"isbn": [f"b{k:03d}" for k in range(200)], "genre": rng.choice(["crime", "poetry", "travel"], 200)}
)
taste = {f"u{k:03d}": rng.choice(["crime", "poetry", "travel"]) for k in range(400)}
rows = [
    (user, book, float(np.clip(3 + 1.5 * (genre == liked) + 0.5 * rng.normal(), 1, 5)))
    for user, liked in taste.items()
    for book, genre in books.iloc[:190].sample(15, random_state=rng.integers(1 << 31)).itertuples(index=False)
]
ratings = pd.DataFrame(rows, columns=["user", "isbn", "stars"])

data = mr.from_pandas(ratings, item_features=books, unrated_items=True)
for note in data.notes:
    print("note:", note)
learner = mr.learners.ridge(mr.models.content_model(data.columns, size=4))
start = mr.warm_start(learner.init(jax.random.key(0)), data)
found = mr.fit(learner, data, steps=300, params=start)

shelf = dict(books.itertuples(index=False))
crime = [book for book, genre in shelf.items() if genre == "crime"][:3]
recommender = mr.Recommender(found.method, data, mr.catalogue(data))
everything = [item.item_id for item in recommender.recommend(dict.fromkeys(crime, 5.0), n=200)]
new = [book for book in everything if int(book[1:]) >= 190]
print("never rated, best first:", [(book, shelf[book]) for book in new])
assert shelf[new[0]] == "crime"
