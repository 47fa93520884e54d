"""Documents in, deterministic packed batches out: reading, holding out, tokenising once, packing. Numpy only.

Section 3.1.1 of the paper names the tokenizer, 3.1.2 the batch size; packing and storage are our choice.
This room knows no model and no device, and downloads nothing.
"""

from dsv2.data.batches import IGNORED, Batch, BatchLoader
from dsv2.data.documents import CORPORA, Document, corpus, read_documents, split_held_out
from dsv2.data.shards import Manifest, Tokenizer, TokenShards, write_shards

__all__ = [
    "CORPORA",
    "IGNORED",
    "Batch",
    "BatchLoader",
    "Document",
    "Manifest",
    "TokenShards",
    "Tokenizer",
    "corpus",
    "read_documents",
    "split_held_out",
    "write_shards",
]
