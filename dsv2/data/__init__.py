"""Documents in, deterministic packed batches out: reading, filtering, deduplicating, mixing, tokenising once, packing.

Section 3.1.1 of the paper names the tokenizer, 3.1.2 the batch size; filters, packing and storage are our choice.
Numpy only; Parquet, zstd and `datasets` sources need a package each, which is imported where it is used.
This room knows no model and no device, and downloads nothing.
"""

from dsv2.data.batches import IGNORED, Batch, BatchLoader
from dsv2.data.documents import CORPORA, Document, corpus, read_documents, split_held_out
from dsv2.data.fim import FIM_TOKENS
from dsv2.data.parts import Preparation
from dsv2.data.prepare import prepare
from dsv2.data.shards import Manifest, Tokenizer, TokenShards, write_shards

__all__ = [
    "CORPORA",
    "FIM_TOKENS",
    "IGNORED",
    "Batch",
    "BatchLoader",
    "Document",
    "Manifest",
    "Preparation",
    "TokenShards",
    "Tokenizer",
    "corpus",
    "prepare",
    "read_documents",
    "split_held_out",
    "write_shards",
]
