"""Causal, masked and span objectives with one transformer, on the same text in the same order; the argument is which.

    python -m sslx.data.tokenize train --vocab-size 4096 --out stdlib.json stdlib
    for objective in causal_lm masked_lm span_corruption; do
        python -m sslx.scaling.sweep --config studies/objectives_text/config.py:$objective --out RUNS/$objective \
            --sizes model.width=64 --budgets 3e11,1e12,3e12 --learning-rate config --batch-size config
    done

Half of the layers of a span corruption are its encoder's, the others its decoder's. Frozen features, means over a
window of 128 tokens, tell the standard library's packages apart, on files that are held out.
"""

import ml_collections

OBJECTIVES = dict(causal_lm={}, masked_lm=dict(rate=0.15), span_corruption=dict(rate=0.15, mean_span=3.0))


def get_config(objective: str = "causal_lm") -> ml_collections.ConfigDict:
    steps, width, depth = 1000, 64, 4
    text = dict(name="text", path="stdlib", length=128, tokenizer="stdlib.json")
    labelled = text | dict(labels="package")
    config = ml_collections.ConfigDict()
    config.mesh = dict(data=-1)
    config.model = dict(vocab_size=4096, width=width, heads=2, norm="rms", mlp="gelu", position="rope", bias=False,
                        scan=False, dtype="float32")
    if objective == "span_corruption":
        config.model.update(name="encdec", depth=depth // 2, decoder_depth=depth // 2)
    else:
        config.model.update(name="transformer", depth=depth, max_length=128)
    config.objective = dict(name=objective, **OBJECTIVES[objective])
    config.data = dict(batch_size=4, train=text | dict(split="train"))
    config.optim = dict(steps=steps, learning_rate=3e-3, schedule="cosine", warmup=steps // 10, weight_decay=0.01,
                        b2=0.98, clip=1.0)
    config.run = dict(steps=steps, seed=0)
    config.evals = dict(batch_size=64, knn=dict(k=5), probe=dict(), collapse=dict(),
                        labelled=dict(train=labelled | dict(split="train", limit=4000),
                                      test=labelled | dict(split="heldout", limit=1000)))
    return config
