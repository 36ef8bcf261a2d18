"""What is compared, in shapes that both sides read."""

from typing import NamedTuple


class Case(NamedTuple):
    """A training step, or a batch that is read: `batch` rows of `size` tokens, or pixels of a view."""

    title: str
    batch: int
    size: int


WIDTH, HEADS = 384, 6
PIXELS = 96  # of an image that views are taken from
JPEG = (375, 500)
CASES = {
    "gpt": Case("GPT, 6 layers of 384, V 256", 8, 256),
    "bert": Case("BERT, 6 layers of 384, V 30522", 8, 128),
    "mae": Case("MAE, ViT-S/8, decoder 8 x 512", 32, 96),
    "simclr": Case("SimCLR, ResNet-18, views included", 16, 64),
    "dino": Case("DINO, ViT-S/8, 2 + 4 crops, views included", 8, 64),
    "t5": Case("T5, 6 + 6 layers of 384, 512 -> 114", 4, 512),
    "rows": Case("windows of 1024 tokens, on the host", 64, 1024),
    "tokens": Case("windows of 1024 tokens, read ahead and placed on the device", 64, 1024),
    "jpeg": Case("JPEG of 375 x 500 to a training view", 32, 224),
}
INPUTS = ("rows", "tokens", "jpeg")  # no dtype
DINO = dict(local_size=32, n_local=4, prototypes=4096, hidden=2048, bottleneck=256)
BERT_VOCABULARY, T5_VOCABULARY, T5_TARGETS = 30522, 32128, 114
