"""Zero-shot classification: the class whose name is nearest to an image."""

import numpy as np

from sslx.config import UserError
from sslx.evals import Evaluation, Subject


def make(*, templates: tuple[str, ...] = ("{}",)) -> Evaluation:
    """`zero_shot/accuracy` on evals.labelled.test, by cosine.

    A class is the mean of the embeddings of `templates` with its name.

    Raises UserError for a source without names of its classes.
    """
    for template in templates:
        if "{}" not in template:
            raise UserError(f"evals.zero_shot.templates has {template!r}, with no {{}} where the name of a class goes")

    def evaluate(subject: Subject) -> dict[str, float]:
        info = subject.split("test").info
        if not info.classes:
            raise UserError(f"evals.zero_shot takes classes with names, and {info.name!r} has none: remove it")
        pairs = subject.embeddings("test")
        texts = [template.format(name.replace("-", " ")) for name in info.classes for template in templates]
        tokens_NT, segments_NT = info.encode(texts)
        text_CTD = subject.texts(tokens_NT, segments_NT, info.shape).reshape(len(info.classes), len(templates), -1)
        mean_CD = text_CTD.mean(1)
        text_CD = mean_CD / np.maximum(np.linalg.norm(mean_CD, axis=1, keepdims=True), 1e-12)
        guesses_N = (pairs["image"] @ text_CD.T).argmax(1)
        return {"zero_shot/accuracy": float((guesses_N == pairs["label"]).mean())}

    return Evaluation(evaluate, {"test": 1}, ("embed",))
