"""The operations that decide speed: one room an operation, four files a room.

`__init__.py` is the public function, its contract and its dispatch; `reference.py` is plain torch that reads like the
paper and runs anywhere; `kernel.py` is Triton or Gluon behind a torch.library operator; `cases.py` holds inputs and
counted work, which the parity tests and the benchmark runner walk. A room may add `hopper.py`, Gluon for one GPU
generation, where Triton leaves speed on the table, or `sdpa.py`, a library's kernel where that is faster.
Tensors in, tensors out: nothing here knows a model.
"""
