"""T5's span corruption on the text of Python's standard library, judged by which package a text is from.

    python -m sslx.main --config configs/span_text.py --workdir /tmp/span_text

15 % of a window in spans of 3 on average: of 256 bytes an encoder input of 232 and a target of 52 tokens. The
probe tells the standard library's packages apart by a window of text, on files that are held out from training.

Bytes by default. With a tokenizer, which sees words, a small network learns what tells packages apart in minutes:

    python -m sslx.data.tokenize train --vocab-size 4096 --out stdlib.json stdlib
    python -m sslx.main --config configs/span_text.py:stdlib.json --workdir /tmp/span_text
"""

import ml_collections


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    debug, words = arg == "debug", arg.endswith(".json")
    vocabulary, tokenizer = (4096, arg) if words else (384, "bytes")
    length, width, depth = (64, 64, 2) if debug else (128, 128, 2) if words else (256, 256, 4)
    steps, batch, learning_rate = (24, 8, 1e-3) if debug else (1500, 32, 3e-3) if words else (3000, 16, 1e-3)
    config = ml_collections.ConfigDict()
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.model = dict(name="encdec", vocab_size=vocabulary, width=width, depth=depth, heads=width // 32,
                        position="relative", mlp="gelu", remat="none", dtype="bfloat16")
    config.objective = dict(name="span_corruption", rate=0.15, mean_span=3.0)
    text = dict(name="text", path="stdlib", length=length, tokenizer=tokenizer)
    config.data = dict(batch_size=batch, train=text | dict(split="train"))
    config.optim = dict(steps=steps, learning_rate=learning_rate, schedule="cosine", warmup=steps // 10,
                        weight_decay=0.01, b2=0.98, clip=1.0)
    config.run = dict(steps=steps, seed=0, log_every=4 if debug else 20, eval_every=steps // 2, save_every=steps // 3)
    labelled = text | dict(labels="package")
    config.evals = dict(
        batch_size=8 if debug else 64,
        heldout=dict(source=text | dict(split="heldout"), batches=2 if debug else 16),
        labelled=dict(train=labelled | dict(split="train", limit=100 if debug else 4000),
                      test=labelled | dict(split="heldout", limit=50 if debug else 1000)),
        probe=dict(), knn=dict(k=5), collapse=dict(),
    )
    return config
