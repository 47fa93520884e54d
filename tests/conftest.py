"""What every test runs under: no network, and one thread, which small shapes are fastest with.

Set before anything imports torch or huggingface_hub; processes that tests start inherit it.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
