"""What a run measures its encoders on."""

import torch
from PIL import Image

from hf_vicreg.modeling.modeling_vicreg import VicRegForPreTraining
from hf_vicreg.training.evaluation.online_probe import OnlineProbe
from hf_vicreg.training.images.run_images import load_images
from hf_vicreg.training.launch.distributed import build_accelerator
from hf_vicreg.training.run.processors import build_processor
from hf_vicreg.training.run.resolve import resolve


def test_bank_and_queries_are_of_every_class_of_a_sorted_folder(tmp_path, tiny_recipe):
    """Grey images without anything to tell them apart: one class of four would be found by all, by chance alone."""
    for split, each in (("train", 8), ("test", 4)):
        for name in "abcd":
            (tmp_path / "sorted" / split / name).mkdir(parents=True)
            for index in range(each):
                Image.new("RGB", (16, 16), (90, 90, 90)).save(tmp_path / "sorted" / split / name / f"{index}.png")
    numbers = {"knn_train_samples": 8, "knn_test_samples": 4, "batch_size": 4, "max_steps": 1}
    config = resolve(
        tiny_recipe | numbers | {"dataset_name": str(tmp_path / "sorted"), "output_dir": str(tmp_path / "run")}
    )
    _, bank, test = load_images(config)
    torch.manual_seed(0)
    model, accelerator = VicRegForPreTraining(config.vicreg), build_accelerator("no", device="cpu")
    probe = OnlineProbe(
        bank, test, build_processor(config), model, accelerator, neighbours=1, num_queries=4, linear=False
    )
    assert sorted(bank.labels) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert sorted(probe.test.labels) == [0, 1, 2, 3]
    assert probe.of_pixels()["knn"]["raw_pixels"] == 0.25
