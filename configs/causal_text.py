"""GPT-2-like causal language modelling with byte-pair encoding on the text of Python's standard library.

    python -m sslx.data.tokenize train --vocab-size 4000 --out /tmp/bpe.json stdlib
    python -m sslx.main --config configs/causal_text.py:/tmp/bpe.json --workdir /tmp/causal_text

Without an argument the tokens are bytes. 6 layers of 384.
"""

import ml_collections


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    debug = arg == "debug"
    tokenizer = arg if arg and not debug else "bytes"
    steps = 24 if debug else 2000
    width, length = (64, 64) if debug else (384, 256)
    config = ml_collections.ConfigDict()
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.model = dict(name="transformer", vocab_size=384 if tokenizer == "bytes" else 4352, max_length=length,
                        width=width, depth=2 if debug else 6, heads=2 if debug else 6, norm="layer", mlp="gelu",
                        position="learned", remat="none", dtype="bfloat16")
    config.objective = dict(name="causal_lm", sample_length=64 if debug else 256)
    text = dict(name="text", path="stdlib", length=length, tokenizer=tokenizer, documents=True)
    config.data = dict(batch_size=8, train=text | dict(split="train"))
    config.optim = dict(steps=steps, learning_rate=1e-3, schedule="cosine", warmup=steps // 20, final=0.1,
                        weight_decay=0.1, b2=0.95, clip=1.0)
    config.run = dict(steps=steps, seed=0, log_every=4 if debug else 20, eval_every=steps // 2, save_every=steps // 3)
    config.evals = dict(batch_size=8, heldout=dict(source=text | dict(split="heldout"), batches=2 if debug else 64))
    return config
