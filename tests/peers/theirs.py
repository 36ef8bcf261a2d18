"""Peers in PyTorch: plain models, transformers, lightly, each a function that makes `step()` for a dtype.

`best` is what their users do for speed: a fused optimizer and torch.compile; without it everything is as it comes.
"""

import contextlib
import functools
import pathlib

import numpy as np
import torch
import torch.nn.functional as F
from cases import CASES, DINO, PIXELS, T5_TARGETS, Case
from torch import nn

RNG = np.random.default_rng(0)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        B, T, D = x.shape
        heads = (B, T, self.heads, D // self.heads)
        q, k, v = (y.view(heads).transpose(1, 2) for y in self.qkv(self.norm_1(x)).split(D, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, D))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class Gpt(nn.Module):
    """GPT-2's shape, the head tied to the table."""

    def __init__(self, case: Case):
        super().__init__()
        width = case.width
        self.tokens, self.positions = nn.Embedding(case.vocabulary, width), nn.Embedding(case.size, width)
        self.blocks, self.norm = nn.ModuleList(Block(width, case.heads) for _ in range(case.depth)), nn.LayerNorm(width)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions.weight
        for block in self.blocks:
            x = block(x)
        logits = self.norm(x) @ self.tokens.weight.T
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


class Windows(torch.utils.data.Dataset):
    """Windows of a memory-mapped array of tokens, as nanoGPT reads them."""

    def __init__(self, path: str, length: int):
        self.tokens, self.length = np.memmap(path, np.uint16, "r"), length

    def __len__(self):
        return len(self.tokens) // self.length

    def __getitem__(self, i):
        return torch.from_numpy(self.tokens[i * self.length:(i + 1) * self.length].astype(np.int64))


def trained(model: nn.Module, loss_of, dtype: str, best: bool):
    """A function that takes one step of AdamW on `loss_of()`, a loss in autocast."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3, fused=best or None)

    def step():
        half = torch.autocast(DEVICE, torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()
        with half:
            loss = loss_of()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return step


def compiled(model: nn.Module, best: bool) -> nn.Module:
    model.to(DEVICE)
    return torch.compile(model) if best else model


def noise(vocabulary: int, rows: int, length: int) -> torch.Tensor:
    return torch.from_numpy(RNG.integers(0, vocabulary, (rows, length))).to(DEVICE)


def endless(loader):
    while True:
        yield from loader


def tokens(dtype: str, best: bool, data: pathlib.Path):
    """At its best: the rows of a batch are gathered by one index of the array."""
    case = CASES["tokens"]
    windows = Windows(str(next((data / "tokens").glob("train-*.bin"))), case.size)
    if best:
        rows = windows.tokens[:len(windows) * case.size].reshape(-1, case.size)
        return lambda: torch.from_numpy(rows[np.sort(RNG.integers(0, len(rows), case.batch))].astype(np.int64))
    batches = endless(torch.utils.data.DataLoader(windows, case.batch, shuffle=True))
    return lambda: next(batches)


rows = tokens  # without workers it reads when it is asked


def jpeg(dtype: str, best: bool, data: pathlib.Path):
    """At its best: decoding and transforms on tensors, without Pillow."""
    from torchvision import datasets, io
    from torchvision.transforms import v2

    case = CASES["jpeg"]
    crop = [v2.RandomResizedCrop(case.size, scale=(0.2, 1.0), antialias=True), v2.RandomHorizontalFlip()]
    scaled = [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]
    transform = v2.Compose([*crop, *([] if best else [v2.ToImage()]), *scaled])
    loader = (lambda path: io.decode_image(path, io.ImageReadMode.RGB)) if best else datasets.folder.default_loader
    images = datasets.ImageFolder(str(data / "images"), transform, loader=loader)
    batches = endless(torch.utils.data.DataLoader(images, case.batch, shuffle=True))
    return lambda: next(batches)


def gpt(dtype: str, best: bool, data: pathlib.Path, name: str = "gpt"):
    case = CASES[name]
    model = Gpt(case)
    run = compiled(model, best)
    return trained(model, lambda: run(noise(case.vocabulary, case.batch, case.size)), dtype, best)


gpt2 = functools.partial(gpt, name="gpt2")


def llama(dtype: str, best: bool, data: pathlib.Path):
    from transformers import LlamaConfig, LlamaForCausalLM

    case = CASES["llama"]
    model = LlamaForCausalLM(LlamaConfig(vocab_size=case.vocabulary, hidden_size=case.width,
                                         num_hidden_layers=case.depth, num_attention_heads=case.heads,
                                         num_key_value_heads=case.heads // 2, intermediate_size=11 * case.width // 4,
                                         max_position_embeddings=case.size, use_cache=False))
    model.gradient_checkpointing_enable()
    run = compiled(model, best)

    def loss():
        x = noise(case.vocabulary, case.batch, case.size)
        return run(input_ids=x, labels=x).loss

    return trained(model, loss, dtype, best)


def bert(dtype: str, best: bool, data: pathlib.Path):
    from transformers import BertConfig, BertForMaskedLM

    case = CASES["bert"]
    model = BertForMaskedLM(BertConfig(vocab_size=case.vocabulary, hidden_size=case.width,
                                       num_hidden_layers=case.depth, num_attention_heads=case.heads,
                                       intermediate_size=4 * case.width, max_position_embeddings=case.size))
    run = compiled(model, best)

    def loss():
        x = noise(case.vocabulary, case.batch, case.size)
        chosen = torch.rand(x.shape, device=DEVICE) < 0.15
        return run(input_ids=x.masked_fill(chosen, 103), labels=x.masked_fill(~chosen, -100)).loss

    return trained(model, loss, dtype, best)


def mae(dtype: str, best: bool, data: pathlib.Path, name: str = "mae", patch: int = 8):
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    case = CASES[name]
    model = ViTMAEForPreTraining(ViTMAEConfig(hidden_size=case.width, num_hidden_layers=case.depth,
                                              num_attention_heads=case.heads, intermediate_size=4 * case.width,
                                              image_size=case.size, patch_size=patch, norm_pix_loss=True))
    run, shape = compiled(model, best), (case.batch, 3, case.size, case.size)
    return trained(model, lambda: run(pixel_values=torch.rand(shape, device=DEVICE)).loss, dtype, best)


mae_l = functools.partial(mae, name="mae_l", patch=16)


def t5(dtype: str, best: bool, data: pathlib.Path):
    from transformers import T5Config, T5ForConditionalGeneration

    case = CASES["t5"]
    model = T5ForConditionalGeneration(T5Config(vocab_size=case.vocabulary, d_model=case.width,
                                                d_kv=case.width // case.heads, d_ff=4 * case.width,
                                                num_layers=case.depth, num_heads=case.heads, dropout_rate=0.0,
                                                decoder_start_token_id=0))
    run, words = compiled(model, best), case.vocabulary - 128
    return trained(model, lambda: run(input_ids=noise(words, case.batch, case.size),
                                      labels=noise(words, case.batch, T5_TARGETS)).loss, dtype, best)


def pictures(n: int) -> list:
    from PIL import Image

    return [Image.fromarray(x) for x in RNG.integers(0, 256, (n, PIXELS, PIXELS, 3), np.uint8)]


def views_of(transform, shown: list, rows: int) -> list[torch.Tensor]:
    """The views of a batch of pictures drawn at random, each [rows, C, H, W]."""
    each = [transform(shown[i]) for i in RNG.integers(0, len(shown), rows)]
    return [torch.stack(view).to(DEVICE) for view in zip(*each, strict=True)]


def simclr(dtype: str, best: bool, data: pathlib.Path):
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform
    from torchvision.models import resnet18

    case = CASES["simclr"]
    backbone = resnet18()
    backbone.fc = nn.Identity()
    model = nn.Sequential(backbone, SimCLRProjectionHead(512, 512, 128))
    run, views, criterion = compiled(model, best), SimCLRTransform(input_size=case.size), NTXentLoss(0.1)
    shown = pictures(256)

    return trained(model, lambda: criterion(*map(run, views_of(views, shown, case.batch))), dtype, best)


def simclr_50(dtype: str, best: bool, data: pathlib.Path):
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from torchvision.models import resnet50

    case = CASES["simclr_50"]
    backbone = resnet50()
    backbone.fc = nn.Identity()
    model = nn.Sequential(backbone, SimCLRProjectionHead(2048, 2048, 128))
    run, criterion, shape = compiled(model, best), NTXentLoss(0.1), (case.batch, 3, case.size, case.size)
    return trained(model, lambda: criterion(*(run(torch.rand(shape, device=DEVICE)) for _ in range(2))), dtype, best)


def dino(dtype: str, best: bool, data: pathlib.Path):
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    from lightly.transforms import DINOTransform
    from transformers import ViTConfig, ViTModel

    case = CASES["dino"]

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = ViTModel(ViTConfig(hidden_size=case.width, num_hidden_layers=case.depth,
                                              num_attention_heads=case.heads, intermediate_size=4 * case.width,
                                              image_size=case.size, patch_size=8, hidden_dropout_prob=0.0),
                                    add_pooling_layer=False)
            self.head = DINOProjectionHead(case.width, DINO["hidden"], DINO["bottleneck"], DINO["prototypes"])

        def forward(self, x):
            return self.head(self.encoder(x, interpolate_pos_encoding=True).last_hidden_state[:, 0])

    student, teacher = Network(), Network()
    deactivate_requires_grad(teacher)
    of_student, of_teacher = compiled(student, best), compiled(teacher, best)
    views = DINOTransform(global_crop_size=case.size, local_crop_size=DINO["local_size"], n_local_views=DINO["n_local"])
    criterion, shown = DINOLoss(output_dim=DINO["prototypes"]).to(DEVICE), pictures(256)

    def loss():
        update_momentum(student, teacher, 0.99)
        crops = views_of(views, shown, case.batch)
        with torch.no_grad():
            targets = [of_teacher(view) for view in crops[:2]]
        return criterion(targets, [of_student(view) for view in crops], epoch=0)

    return trained(student, loss, dtype, best)
