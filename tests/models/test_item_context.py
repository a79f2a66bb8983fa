"""Numbers, tags and vectors of items: what a training's items decide, and how any later item is read by it."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from models.errors import InputError
from models.item_context import (
    BUCKETS,
    TAGS_MAX,
    Context,
    ContextFields,
    ItemContext,
    Tags,
    context_of,
    fit_context,
    tag_index,
    told,
)

PRICE, TAGS = ContextFields(numbers=("price",)), ContextFields(tags=("tags",))
IMAGE = ContextFields(vectors=("image",))


def table(**columns: list) -> pa.Table:
    """Items i0, i1, ...; lists of numbers are as Spark has them."""
    (count,) = {len(column) for column in columns.values()}
    made = {"item_id": [f"i{n}" for n in range(count)], **columns}
    if "image" in made:
        made["image"] = pa.array(made["image"], pa.list_(pa.float64()))
    return pa.table(made)


def read(items: pa.Table, fields: ContextFields, later: pa.Table | None = None) -> ItemContext:
    """Items by what these, or the items of an earlier training, decide."""
    context, tags = fit_context(items, fields)
    return context_of(items if later is None else later, context, tag_index(tags))


def test_each_range_of_numbers_has_as_many_items_whatever_their_scale():
    rng = np.random.default_rng(0)
    value_N = np.exp(3 * rng.normal(size=6400))
    row_N = read(table(price=[repr(float(v)) for v in value_N]), PRICE).row_NC[:, 0]
    assert np.unique(row_N).tolist() == list(range(1, BUCKETS + 1))
    # To one: a range begins at an item's own number.
    assert np.ptp(np.bincount(row_N)[1:]) <= 2
    # A larger number is in no lower range.
    assert (np.diff(row_N[np.argsort(value_N)]) >= 0).all()


def test_equal_numbers_have_one_range_and_none_is_without_items():
    items = table(price=["0"] * 900 + ["1"] * 60 + ["7"] * 40)
    context, _ = fit_context(items, PRICE)
    assert context.numbers == {"price": [1.0, 7.0]}
    assert context.number_rows == [4]
    found = read(items, PRICE, table(price=["-5", "0", "0.99", "1", "6", "7", "1e300", None]))
    assert found.row_NC[:, 0].tolist() == [1, 1, 1, 2, 2, 3, 3, 0]
    assert fit_context(table(price=["3", "3"]), PRICE)[0].numbers == {"price": []}


def test_numbers_that_are_none_are_absent_and_counted():
    items = table(price=["1", "2", "3", "nan", "inf", "-Infinity", "three", "", " ", None, "1e999"])
    found = read(items, PRICE)
    assert found.row_NC[3:, 0].tolist() == [0] * 8
    assert found.row_NC[:3, 0].tolist() == [1, 2, 3]
    # Empty cells are no mistake.
    assert found.left_out == {"price": 5}
    with pytest.raises(InputError, match="no item has a number 'price'; vql ingest-items --column price=EXPRESSION"):
        fit_context(table(price=["nan", None]), PRICE)


def test_tags_are_a_text_or_an_array_each_once_in_their_order():
    texts = table(tags=["b|a", " a ||b|a", "", None, "|", "c"])
    arrays = table(tags=[["b", "a"], [" a ", "", "b", None, "a"], [], None, [""], ["c"]])
    context, values = fit_context(texts, TAGS)
    assert (context.tags, values) == ({"tags": Tags(known=3, most=2)}, {"tags": ["a", "b", "c"]})
    assert fit_context(arrays, TAGS) == (context, values)
    for items in (texts, arrays):
        assert read(items, TAGS).row_NC.tolist() == [[2, 1], [1, 2], [0, 0], [0, 0], [0, 0], [3, 0]]
    with pytest.raises(InputError, match="no item has a tag of 'tags'"):
        fit_context(table(tags=["", None]), TAGS)


def test_unknown_tags_take_no_place_from_known_ones():
    found = read(table(tags=["a|b", "c"]), TAGS, table(tags=["x|y|z|b|c", "x", "a|x|c|b"]))
    assert found.row_NC.tolist() == [[2, 3], [0, 0], [1, 3]]
    assert found.left_out == {"tags": 1}


def test_of_ten_thousand_tags_the_first_are_read_and_the_rest_is_counted():
    many = "|".join(f"t{n}" for n in range(10_000))
    items = table(tags=[many, "t3|t9999", "other"])
    context, values = fit_context(items, TAGS)
    # The rest makes no rows either.
    assert sorted(values["tags"]) == sorted([*(f"t{n}" for n in range(TAGS_MAX)), "other", "t9999"])
    assert context.tags["tags"].most == TAGS_MAX
    found = read(items, TAGS)
    row = {tag: r + 1 for r, tag in enumerate(values["tags"])}
    assert found.row_NC[0].tolist() == [row[f"t{n}"] for n in range(TAGS_MAX)]
    # Of what was cut off, another item knows one.
    assert found.left_out == {"tags": 1}
    again = read(items, TAGS, table(tags=["|".join(reversed(values["tags"]))]))
    assert again.left_out == {"tags": len(row) - TAGS_MAX}


def test_vectors_that_are_not_finite_are_absent_and_counted():
    nan, inf = float("nan"), float("inf")
    rows = [[1.0, 2.0], None, [nan, 1.0], [1.0, inf], [1.0, None], [1e300, 0.0], [], [3.0, 4.0]]
    found = read(table(image=rows), IMAGE)
    assert found.vector_NP.dtype == np.float32
    assert np.isnan(found.vector_NP).all(axis=1).tolist() == [False, *[True] * 6, False]
    assert found.vector_NP[[0, 7]].tolist() == [[1, 2], [3, 4]]
    assert found.left_out == {"image": 4}


def test_vectors_of_another_width_or_kind_are_refused_by_the_item():
    with pytest.raises(InputError, match=r"vector 'image' of item 'i2' has 3 numbers, others have 2 \(2 such items"):
        read(table(image=[None, [1.0, 2.0], [1.0, 2.0, 3.0], [1.0]]), IMAGE)
    with pytest.raises(InputError, match="of item 'i0' has 1 numbers, others have 2"):
        read(table(image=[[1.0, 2.0]]), IMAGE, table(image=[[1.0]]))
    with pytest.raises(InputError, match="no item has a vector 'image'"):
        fit_context(table(image=[None, []]), IMAGE)
    for odd in (["[1.0, 2.0]"], [["1", "2"]], ["7"]):
        with pytest.raises(InputError, match=r"not lists of numbers; make them with .* from_json|from_json"):
            fit_context(pa.table({"item_id": ["i0"], "image": odd}), IMAGE)


def test_columns_are_numbers_then_tags_and_items_are_read_alike_in_any_company():
    rng = np.random.default_rng(0)
    fields = ContextFields(numbers=("price", "age"), tags=("tags",), vectors=("image", "text"))
    items = table(
        price=[str(v) for v in rng.normal(size=50)],
        age=[str(v) for v in rng.integers(0, 5, 50)],
        tags=["|".join(rng.choice(list("abcdef"), rng.integers(0, 4))) for _ in range(50)],
        image=[rng.normal(size=3).tolist() if rng.random() < 0.8 else None for _ in range(50)],
    )
    items = items.append_column("text", pa.array(rng.normal(size=(50, 2)).tolist(), pa.list_(pa.float32())))
    context, tags = fit_context(items, fields)
    whole = context_of(items, context, tag_index(tags))
    assert whole.row_NC.shape == (50, context.columns) == (50, 2 + context.tags["tags"].most)
    assert whole.vector_NP.shape == (50, context.vector_width) == (50, 5)
    assert context.names == fields.names
    # Chunks of other bounds, as Spark gives them.
    parts = [context_of(items.slice(n, 7), context, tag_index(tags)) for n in range(0, 50, 7)]
    np.testing.assert_array_equal(np.concatenate([part.row_NC for part in parts]), whole.row_NC)
    np.testing.assert_array_equal(np.concatenate([part.vector_NP for part in parts]), whole.vector_NP)


def test_what_was_left_out_is_told_by_its_name():
    context = Context(numbers={"price": []}, tags={"tags": Tags(known=9, most=4)}, vectors={"image": 2})
    said = told(context, {"price": 1200, "tags": 3, "image": 0})
    assert said == "1,200 numbers of price that are none, or not finite, 3 tags of tags beyond the first 4 of an item"
    assert told(context, {"price": 0, "tags": 0, "image": 0}) == told(Context(), {}) == ""
