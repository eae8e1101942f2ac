"""A small table of named columns over NumPy arrays: select, join, group, print.

Every column is an array of one axis, and all have the same length. A cell without a value is NaN in
a column of numbers and "" in a column of text.
"""

import csv
import io

import numpy as np
from numpy import cumproduct, product

TEXT = (np.unicode_, np.string_)
MISSING = np.NaN


class ColumnError(KeyError):
    """A column that the table does not have."""


def is_text(column):
    """Whether a column holds text."""
    return issubclass(column.dtype.type, TEXT)


def parse_cell(text):
    """A number if the text is one, else the text."""
    try:
        return float(text)
    except ValueError:
        return text


def as_column(values):
    """An array for a column: floating point if all values are numbers, else text."""
    array = np.asarray(values)
    if issubclass(array.dtype.type, TEXT):
        return array.astype(np.unicode_)
    return array.astype(np.float_)


class Table:
    """Named columns of the same length."""

    decimals = 3

    def __init__(self, columns):
        self.columns = {name: as_column(values) for name, values in columns.items()}
        lengths = {len(column) for column in self.columns.values()}
        if len(lengths) > 1:
            raise ValueError(f"columns of different lengths: {sorted(lengths)}")

    @classmethod
    def from_csv(cls, text):
        """A table from CSV text whose first line names the columns."""
        rows = list(csv.reader(io.StringIO(text)))
        names, cells = rows[0], rows[1:]
        columns = {}
        for i, name in enumerate(names):
            values = [parse_cell(row[i]) for row in cells]
            if all(isinstance(value, float) or value == "" for value in values):
                values = [MISSING if value == "" else value for value in values]
            else:
                values = [str(value) for value in values]
            columns[name] = values
        return cls(columns)

    def to_csv(self):
        """The table as CSV text, numbers rounded to `decimals`."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.columns)
        shown = []
        for column in self.columns.values():
            # text stays as it is
            shown.append(column if is_text(column) else np.round_(column, self.decimals))
        writer.writerows(zip(*(column.tolist() for column in shown)))
        return out.getvalue()

    def __len__(self):
        return len(next(iter(self.columns.values()), ()))

    def __getitem__(self, name):
        try:
            return self.columns[name]
        except KeyError:
            raise ColumnError(f"no column {name!r}; there are {', '.join(self.columns)}")

    def __eq__(self, other):
        if list(self.columns) != list(other.columns):
            return False
        return all(np.alltrue(self[name] == other[name]) for name in self.columns)

    def take(self, rows):
        """The table of some rows, given by index or by a mask."""
        return Table({name: column[rows] for name, column in self.columns.items()})

    def select(self, *names):
        """The table of some columns, in that order."""
        return Table({name: self[name] for name in names})

    def where(self, name, values):
        """The rows in which a column has one of some values."""
        return self.take(np.in1d(self[name], values))

    def complete(self):
        """The rows without a missing value."""
        full = np.ones(len(self), dtype=bool)
        for column in self.columns.values():
            full &= column != "" if is_text(column) else ~np.isnan(column)
        return self.take(full)

    def sort(self, name, descending=False):
        """The rows in the order of a column; equal ones keep their order."""
        order = np.argsort(self[name], kind="stable")
        if descending:
            order = order[::-1]
        return self.take(order)

    def unique(self, name):
        """The values of a column, sorted, each once."""
        return np.unique(self[name])

    def append(self, other):
        """The rows of both tables; a column of numbers and one of text become text."""
        columns = {}
        for name in self.columns:
            pair = [self[name], other[name]]
            if is_text(pair[0]) != is_text(pair[1]):
                pair = [column.astype(np.unicode_) for column in pair]
            if not is_text(pair[0]):
                kind = np.find_common_type([column.dtype for column in pair], [])
                pair = [column.astype(kind) for column in pair]
            columns[name] = np.concatenate(pair)
        return Table(columns)

    def group(self, name):
        """Yield (value, table of its rows) for every value of a column."""
        for value in self.unique(name):
            yield value, self.take(self[name] == value)

    def summarise(self, by, name, function):
        """A table with a row for each value of column `by`: function of its cells of `name`."""
        values = []
        results = []
        for value, part in self.group(by):
            values.append(value)
            results.append(function(part[name]))
        return Table({by: values, name: results})

    def join(self, other, on):
        """The rows of both tables that agree in a column; the other's must not repeat there."""
        keys = other[on].tolist()
        if len(set(keys)) < len(keys):
            raise ValueError(f"column {on!r} repeats in the second table")
        place = {key: i for i, key in enumerate(keys)}
        ours = [i for i, key in enumerate(self[on].tolist()) if key in place]
        theirs = [place[self[on].tolist()[i]] for i in ours]
        columns = dict(self.take(ours).columns)
        for name, column in other.columns.items():
            if name != on:
                columns[name] = column[theirs]
        return Table(columns)

    def matrix(self, *names):
        """Some columns of numbers as the columns of a matrix, (rows, columns)."""
        return np.row_stack([self[name] for name in names]).T

    def correlation(self, first, second):
        """Pearson's correlation of two columns, over the rows that have both."""
        rows = self.select(first, second).complete()
        return float(np.corrcoef(rows[first], rows[second])[0, 1])

    def ranges(self):
        """{name: (smallest, largest, difference)} of the columns of numbers."""
        found = {}
        for name, column in self.columns.items():
            if not is_text(column):
                known = column[~np.isnan(column)]
                found[name] = (known.min(), known.max(), known.ptp())
        return found

    def show(self, width=10):
        """The table as text, `width` characters a column."""
        lines = ["".join(f"{name:>{width}}" for name in self.columns)]
        for i in range(len(self)):
            cells = [column[i] for column in self.columns.values()]
            texts = [c if isinstance(c, str) else f"{c:.{self.decimals}g}" for c in cells]
            lines.append("".join(f"{text:>{width}}" for text in texts))
        return "\n".join(lines)


def growth(table, name):
    """A column of relative changes as the value of 1 that grows with them."""
    return cumproduct(1 + table[name])


def total_growth(table, name):
    """The last value of growth()."""
    return float(product(1 + table[name]))


def pivot(table, rows, columns, values):
    """A dict of dicts: the sum of `values` for each pair of values of two columns."""
    found = {}
    for row, part in table.group(rows):
        found[row] = {}
        for column, cells in part.group(columns):
            found[row][column] = cells[values].sum()
    return found


CITIES = """city,country,people,area
Oslo,Norway,0.7,454
Bergen,Norway,0.29,465
Aarhus,Denmark,0.29,91
Turku,Finland,,245
"""


def check():
    """The values that this module has always given."""
    table = Table.from_csv(CITIES)
    assert len(table) == 4 and is_text(table["city"]) and not is_text(table["area"])
    assert table.complete() == Table.from_csv(table.complete().to_csv())
    assert table.where("country", ["Norway", "Finland"])["city"].tolist() == [
        "Oslo", "Bergen", "Turku",
    ]
    assert table.sort("area", descending=True)["city"][0] == "Bergen"
    sums = table.complete().summarise("country", "people", np.sum)
    assert np.allclose(sums["people"], [0.29, 0.99])
    more = Table({"city": ["Rome"], "country": ["Italy"], "people": [2.8], "area": ["?"]})
    assert table.append(more)["area"].tolist()[-1] == "?"
    assert table.append(table)["people"].dtype == float
    kings = Table({"country": ["Norway", "Denmark"], "king": ["Harald", "Frederik"]})
    assert table.join(kings, "country")["king"].tolist() == ["Harald", "Harald", "Frederik"]
    assert table.matrix("people", "area").shape == (4, 2)
    assert table.ranges()["area"] == (91, 465, 374)
    assert abs(table.correlation("people", "area") - 0.48) < 0.01
    rates = Table({"rate": [0.1, 0.2, -0.5]})
    assert np.allclose(growth(rates, "rate"), [1.1, 1.32, 0.66])
    assert abs(total_growth(rates, "rate") - 0.66) < 1e-12
    assert pivot(table.complete(), "country", "city", "area")["Norway"]["Oslo"] == 454
    assert table.show().splitlines()[1].split() == ["Oslo", "Norway", "0.7", "454"]
    try:
        table["town"]
    except ColumnError as error:
        assert "no column 'town'" in str(error)


if __name__ == "__main__":
    check()
    print("ok")
