"""A linear probe to watch a run by: logistic regression on the features of the frozen encoder."""

import torch
import torch.nn.functional as F

MAX_ITERATIONS = 100


def linear_accuracy(
    bank: torch.Tensor, bank_labels: torch.Tensor, queries: torch.Tensor, query_labels: torch.Tensor
) -> float:
    """Return the accuracy of a logistic regression on standardised features.

    It minimises the mean cross-entropy over the bank plus `||W||^2 / (2 images)`: the regularisation is not tuned, so
    that the figure is cheap, the same on every process, and comparable within a run. It draws no random number, and
    computes in float64: a hundred iterations would blow up float32's rounding until images change sides.

    Args:
        bank: `(images, features)` features of labelled images, to train on.
        bank_labels: `(images,)` int64.
        queries: `(queries, features)`, to measure on.
        query_labels: `(queries,)` int64.
    """
    bank, queries = bank.double(), queries.double()
    mean, std = bank.mean(0), bank.std(0, correction=0).clamp_min(1e-6)
    bank, queries = (bank - mean) / std, (queries - mean) / std
    classes = int(max(bank_labels.max(), query_labels.max())) + 1
    weight = torch.zeros(classes, bank.shape[1], dtype=bank.dtype, device=bank.device, requires_grad=True)
    bias = torch.zeros(classes, dtype=bank.dtype, device=bank.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=MAX_ITERATIONS, line_search_fn="strong_wolfe")

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(bank @ weight.T + bias, bank_labels) + weight.square().sum() / (2 * len(bank))
        loss.backward()
        return loss

    optimizer.step(objective)
    with torch.no_grad():
        return (queries @ weight.T + bias).argmax(1).eq(query_labels).double().mean().item()
