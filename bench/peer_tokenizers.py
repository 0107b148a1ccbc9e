"""Encodes the rows of a JSONL file with Hugging Face's tokenizers and compares the ids with a token cache of Ounce.

python3 bench/peer_tokenizers.py TOKENIZER.json ROWS.jsonl CACHE.bin THREADS

One line of JSON: seconds of encoding alone, on the clock and of processor time, ids, and whether they are those of the cache. Rows are read in parts, so
that the file may be larger than memory. The layout of the cache is in crates/ounce-io/src/token_cache.rs.
"""

import json
import os
import struct
import sys
import time

PART_ROWS = 4096


def main():
    tokenizer_path, rows_path, cache_path, threads = sys.argv[1:]
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    os.environ["RAYON_NUM_THREADS"] = threads
    import numpy
    from tokenizers import Tokenizer

    with open(cache_path, "rb") as file:
        head = file.read(64)
    id_bytes, n_tokens = struct.unpack_from("<IQ", head, 12)
    (offset,) = struct.unpack_from("<Q", head, 40)
    dtype = "<u2" if id_bytes == 2 else "<u4"
    cache = numpy.memmap(cache_path, dtype, "r", offset, (n_tokens,))

    tokenizer = Tokenizer.from_file(tokenizer_path)
    end = tokenizer.token_to_id("<|endoftext|>")
    seconds, cpu_s, at, is_first, same = 0.0, 0.0, 0, True, True
    with open(rows_path, encoding="utf-8") as file:
        while True:
            rows = [json.loads(line)["text"] for _, line in zip(range(PART_ROWS), file)]
            if not rows:
                break
            start, start_cpu = time.perf_counter(), time.process_time()
            encodings = tokenizer.encode_batch_fast(rows, add_special_tokens=False)
            seconds += time.perf_counter() - start
            cpu_s += time.process_time() - start_cpu
            ids = []
            for encoding in encodings:
                if not is_first:
                    ids.append(end)
                is_first = False
                ids += encoding.ids
            same = same and numpy.array_equal(cache[at : at + len(ids)], ids)
            at += len(ids)
    same = bool(same and at == n_tokens)
    print(json.dumps({"seconds": seconds, "cpu_s": cpu_s, "ids": at, "same": same}))


main()
