"""What a run's encoders are worth while it lasts: k-NN and, if asked for, a linear probe on labels kept apart."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import BaseImageProcessor, PreTrainedModel

from hf_vicreg.modeling.modeling_vicreg import VicRegForPreTraining
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.evaluation.features import encoded_batches, model_encoder
from hf_vicreg.training.evaluation.neighbours import knn_accuracy
from hf_vicreg.training.images.sources import ImageSource
from hf_vicreg.training.launch.sharding import unsharded
from hf_vicreg.training.monitor.progress import Progress

PIXELS_SIDE = 32
MAX_ITERATIONS = 100

Accuracies = dict[str, dict[str, float]]


class OnlineProbe:
    """Accuracies of pixels and of the frozen encoders on a fixed bank and fixed queries.

    Every process encodes its share and all of them see the same numbers. Nothing of it reaches the training: no
    gradient, no random number, and the encoders are back in training mode afterwards.
    """

    def __init__(
        self,
        bank: ImageSource | None,
        test: ImageSource | None,
        processor: BaseImageProcessor,
        model: VicRegForPreTraining,
        accelerator: Accelerator,
        *,
        neighbours: int,
        num_queries: int,
        linear: bool,
    ):
        self.bank, self.test = bank, None if test is None else test.for_probe(num_queries)
        self.processor, self.model, self.accelerator = processor, model, accelerator
        self.neighbours, self.linear = neighbours, linear
        self.averages: Sequence[PreTrainedModel] = ()  # of the encoders, once there are any
        self.possible = all(one is not None and one.labels is not None for one in (bank, self.test))
        self.num_queries = len(self.test) if self.test is not None and self.possible else 0

    def of_pixels(self) -> Accuracies:
        """Return the accuracies of raw pixels, `{"knn": {"raw_pixels": ...}}`, with `linear` if asked for."""
        found = self._accuracies(small_pixels, "raw pixels")
        return {kind: {"raw_pixels": value} for kind, value in found.items()}

    def of_encoders(self, name: str) -> Accuracies:
        """Return the accuracies of each encoder under `name`, the second one's with `second_` before it.

        Where their weights are averaged, these are the averages'; `raw_` stands before those of the weights.
        """
        found: Accuracies = {}
        own = [one for one in self.model.encoders if one.main_input_name == "pixel_values"]  # not one of texts
        names = [name, f"second_{name}"][: len(own)]
        measured = list(zip(names, self.averages or own, strict=False))
        if self.averages:
            measured += zip([f"raw_{one}" for one in names], own, strict=False)
        for key, one in measured:
            encoder = unsharded(one)
            said = f"the {key.replace('_', ', ')} encoder" if name else ""
            for kind, value in self._accuracies(model_encoder(encoder), said).items():
                found.setdefault(kind, {})[key] = value
        return found

    def logged(self) -> dict[str, float]:
        """Return the same by the names of the log: `knn_accuracy`, `linear_accuracy`, `second_knn_accuracy`, ..."""
        return {
            f"{key}{kind}_accuracy": value
            for kind, values in self.of_encoders("").items()
            for key, value in values.items()
        }

    def _accuracies(self, encode_pixels, said: str) -> dict[str, float]:
        """Return accuracies by kind, `knn` and `linear`; how far it is is shown as that of `said`, if it is not empty.

        Raises:
            InputError: No usable image in the bank or among the queries.
        """
        both: list[torch.Tensor] = []
        for field, source in (("train_split", self.bank), ("test_split", self.test)):
            assert source is not None
            both += self._encoded(field, source, encode_pixels, said)
        found = {"knn": knn_accuracy(*both, neighbours=self.neighbours)}
        return found | ({"linear": linear_accuracy(*both)} if self.linear else {})

    def _encoded(self, field: str, source: ImageSource, encode_pixels, said: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return features and labels of a source, in its order, the same bits for any number of processes."""
        assert source.labels is not None
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        progress = Progress(len(source), 0, shown=bool(said) and self.accelerator.is_local_main_process, unit="image")
        progress.describe(f"k-NN of {said}, {field.removesuffix('_split')} images")
        parts = []
        for _, indices, features in encoded_batches(source, self.processor, encode_pixels, share=(rank, processes)):
            parts.append((indices, features))
            progress.update(min(len(source), progress.step + len(indices) * processes))
        progress.close()
        if processes > 1:
            parts = sorted(gather_object(parts), key=lambda part: part[0])
        if not parts:
            raise InputError(
                f"`{field}`: expected usable images for the k-NN accuracy, all {len(source)} of {source.name} "
                "looked at are corrupt or too small; name another split or mend them."
            )
        labels = [source.labels[index] for indices, _ in parts for index in indices]
        return torch.cat([features for _, features in parts]), torch.tensor(labels, dtype=torch.int64)


def small_pixels(pixel_values: torch.Tensor) -> torch.Tensor:
    """Return `(batch, features)` pixels, of a 32x32 image where it is larger: a bank of whole ones fills memories."""
    if max(pixel_values.shape[-2:]) > PIXELS_SIDE:
        pixel_values = F.interpolate(pixel_values, (PIXELS_SIDE, PIXELS_SIDE), mode="bilinear", antialias=True)
    return pixel_values.flatten(1)


def linear_accuracy(
    bank: torch.Tensor,
    bank_labels: torch.Tensor,
    queries: torch.Tensor,
    query_labels: torch.Tensor,
    *,
    iterations: int = MAX_ITERATIONS,
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
        iterations: At most.
    """
    bank, queries = bank.double(), queries.double()
    mean, std = bank.mean(0), bank.std(0, correction=0).clamp_min(1e-6)
    bank, queries = (bank - mean) / std, (queries - mean) / std
    classes = int(max(bank_labels.max(), query_labels.max())) + 1
    weight = torch.zeros(classes, bank.shape[1], dtype=bank.dtype, device=bank.device, requires_grad=True)
    bias = torch.zeros(classes, dtype=bank.dtype, device=bank.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=iterations, line_search_fn="strong_wolfe")

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(bank @ weight.T + bias, bank_labels) + weight.square().sum() / (2 * len(bank))
        loss.backward()
        return loss

    optimizer.step(objective)
    with torch.no_grad():
        return (queries @ weight.T + bias).argmax(1).eq(query_labels).double().mean().item()
