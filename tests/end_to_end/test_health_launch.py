"""Health and probes of a run over two processes are those of the same run over one."""

import json
import sys

import pytest
import yaml

MODULE = "hf_vicreg.training.pretrain"


@pytest.mark.slow  # `make test-rounding` runs it
@pytest.mark.rounding
@pytest.mark.distributed
def test_two_processes_measure_what_one_does(tmp_path, tiny_recipe, run_process, free_port):
    changes = {
        "dataset_name": "digits",
        "max_train_samples": 64,
        "num_train_epochs": 2,
        "knn_every_epochs": 1,
        "knn_train_samples": 61,
        "knn_test_samples": 43,
        "linear_probe": True,
        "model": tiny_recipe["model"] | {"drop_path_rate": 0.0},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_recipe | changes))
    flags = ["-m", MODULE, "--config", "tiny.yaml", "--output_dir"]
    one = run_process([sys.executable, *flags, "one"])
    assert one.returncode == 0, one.stderr
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2]
    launcher += ["--main_process_port", free_port]
    two = run_process([*launcher, *flags, "two"], ACCELERATE_USE_CPU="true")
    assert two.returncode == 0, two.stderr
    assert "2 process(es)" in two.stderr
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("one", "two")]
    timed = {"data_wait_ratio", "images_per_second", "flops_per_second"}  # the last one after ten seconds alone
    for line, other in zip(*([json.loads(line) for line in log] for log in logs), strict=True):
        assert line.keys() - timed == other.keys() - timed
        for key in line.keys() - timed:
            # gradients are summed in another order, so the weights part, and some images change sides
            tolerance = {"abs": 8 / 43} if key.endswith("_accuracy") else {"rel": 1e-2}
            assert other[key] == pytest.approx(line[key], **tolerance), key
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")]
    for kind in ("knn_accuracy", "linear_accuracy"):
        assert results[0][kind].keys() == {"raw_pixels", "untrained", "trained"}
        for name in ("raw_pixels", "untrained"):  # the same weights: to the last bit
            assert results[1][kind][name] == results[0][kind][name]
