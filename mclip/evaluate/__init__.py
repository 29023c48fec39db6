"""Zero-shot classification, linear probe, few-shot and retrieval of image-text models.

    from mclip import evaluate, models, params
    model, _, preprocess, tokenizer = models.create("local-dir:models/teachers/large")
    evaluate.evaluate(model, preprocess, tokenizer, params.load().evaluate.sets)

    mclip evaluate ViT-B-32/laion2b_s34b_b79k --sets imagenet1k robustness my/folder

How a set is evaluated: `mclip.evaluate.suite`. What is measured, one file a task:
`mclip.evaluate.tasks`.
"""

from mclip.evaluate.features import class_features, image_features, prompts
from mclip.evaluate.scores import Result, headline, predictions, summary, write
from mclip.evaluate.suite import evaluate, evaluate_many, load_students
from mclip.evaluate.tasks.classification import confusion

__all__ = [
    "Result",
    "class_features",
    "confusion",
    "evaluate",
    "evaluate_many",
    "headline",
    "image_features",
    "load_students",
    "predictions",
    "prompts",
    "summary",
    "write",
]
