"""What is compared, in shapes that both sides read."""

import os
from typing import NamedTuple


class Case(NamedTuple):
    """A training step, or a batch that is read: `batch` rows of `size` tokens, or pixels of a view."""

    title: str
    batch: int
    size: int
    width: int = 384
    depth: int = 6
    heads: int = 6
    vocabulary: int = 0


PIXELS = 96  # of an image that small views are taken from
JPEG = (375, 500)
CASES = {
    "gpt": Case("GPT, 6 layers of 384, V 256", 8, 256, vocabulary=256),
    "bert": Case("BERT, 6 layers of 384, V 30522", 8, 128, vocabulary=30522),
    "mae": Case("MAE, ViT-S/8, decoder 8 x 512", 32, 96, depth=12),
    "simclr": Case("SimCLR, ResNet-18, views included", 16, 64),
    "dino": Case("DINO, ViT-S/8, 2 + 4 crops, views included", 8, 64, depth=12),
    "t5": Case("T5, 6 + 6 layers of 384, 512 -> 114", 4, 512, vocabulary=32128),
    "rows": Case("windows of 1024 tokens, on the host", 64, 1024),
    "tokens": Case("windows of 1024 tokens, read ahead and placed on the device", 64, 1024),
    "jpeg": Case("JPEG of 375 x 500 to a training view", 32, 224),
    "gpt2": Case("GPT-2 of 124 M, T 1024", 32, 1024, 768, 12, 12, 50304),
    "llama": Case("Llama of 1.1 G, T 2048", 8, 2048, 2048, 22, 32, 32000),
    "mae_l": Case("MAE, ViT-L/16, decoder 8 x 512", 256, 224, 1024, 24, 16),
    "simclr_50": Case("SimCLR, ResNet-50, views on neither side", 256, 224),
}
INPUTS = ("rows", "tokens", "jpeg")  # no dtype
LARGE = ("gpt2", "llama", "mae_l", "simclr_50")  # for an accelerator
DINO = dict(local_size=32, n_local=4, prototypes=4096, hidden=2048, bottleneck=256)
T5_TARGETS = 114

if os.environ.get("PEERS_TINY"):  # the same steps in a size that only shows that they run
    CASES = {name: case._replace(batch=4, size=min(case.size, 64), width=64, depth=2, heads=2,
                                 vocabulary=min(case.vocabulary, 1024)) for name, case in CASES.items()}
