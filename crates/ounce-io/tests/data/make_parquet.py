"""Makes the small Parquet files of the tests with pyarrow: nested messages, nulls, several row groups and pages."""

import pathlib

import pyarrow as pa
import pyarrow.parquet as pq

HERE = pathlib.Path(__file__).parent
rows = [
    {"id": i, "score": i / 4, "messages": [
        {"role": "user", "content": f"What is {i} + {i}?", "name": None},
        {"role": "assistant", "content": f"{2 * i}, caf\u00e9 \U0001f642", "name": "ounce" if i % 2 else None},
    ][: 2 if i != 3 else 0]}
    for i in range(7)
]
table = pa.Table.from_pylist(rows)
for codec in ["snappy", "zstd", "none"]:
    pq.write_table(table, HERE / f"messages.{codec}.parquet", compression=codec, row_group_size=3, data_page_size=64)
pq.write_table(pa.table({"text": ["All the world", "is a stage"]}), HERE / "text.parquet", compression="zstd")
# 300 MB of zeros in a few KB: a page that unpacks to far more than it is allowed.
pq.write_table(pa.table({"text": ["0" * 300_000_000]}), HERE / "bomb.parquet", compression="zstd",
               compression_level=19, use_dictionary=False, write_statistics=False)
pq.write_table(pa.table({"text": ["a", "b"]}), HERE / "gzip.parquet", compression="gzip")
