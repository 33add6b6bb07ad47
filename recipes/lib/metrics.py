"""Metrics of `evaluate` that work offline: `evaluate.load` would fetch their scripts from the hub."""

from typing import Any

import datasets
import evaluate
import numpy as np


class Classification(evaluate.Metric):  # type: ignore[misc]  # evaluate has no types
    """`accuracy`, and `f1`: the mean over the classes that occur, with equal weights; 0 for a class without a hit."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy and macro F1 of a classification",
            citation="",
            inputs_description="Class numbers: predictions and references",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        predicted, actual = np.asarray(predictions), np.asarray(references)
        scores = []
        for label in np.union1d(predicted, actual):
            hits = np.sum((predicted == label) & (actual == label))
            scores.append(2 * hits / (np.sum(predicted == label) + np.sum(actual == label)))
        return {"accuracy": float(np.mean(predicted == actual)), "f1": float(np.mean(scores))}
