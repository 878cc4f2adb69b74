"""`python -m benchmarks.gpu`: its pieces are real processes; without a GPU it says so, and its commands are known."""

import json
import time

import pytest
import torch

from benchmarks import gpu


def piece(code):
    return (1, ["-c", code])


def test_what_ended_well_is_not_done_again_and_the_rest_is(tmp_path):
    counted = tmp_path / "counted"
    add = f"open({str(counted)!r}, 'a').write('x')"
    figures = f"open({str(tmp_path / 'good.json')!r}, 'w').write('[1]')"
    pieces = {
        "good": piece(f"{add}; {figures}; print('fine')"),
        "bad": piece(f"{add}; raise SystemExit(3)"),
        "slow": (0.005, ["-c", "import time; time.sleep(60)"]),
    }
    for turn in (1, 2):
        record = gpu.run_pieces(pieces, tmp_path, time.monotonic() + 60)
        assert {name: one["code"] for name, one in record.items()} == {"good": 0, "bad": 3, "slow": "out of time"}
        assert record["good"]["figures"] == [1]
        assert record["good"]["said"] == "fine\n"
        assert record == json.loads((tmp_path / "gpu.json").read_text())
        assert counted.read_text() == "x" * (1 + turn)
    before = gpu.run_pieces({"later": piece("")}, tmp_path, time.monotonic() - 1)
    assert "later" not in before


def test_without_a_gpu_it_is_one_line(tmp_path, monkeypatch, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr("sys.argv", ["gpu", "--out", str(tmp_path / "out")])
    assert gpu.main() == 2
    assert capsys.readouterr().err.startswith("error: `cuda`: expected a GPU")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vicreg_loss", "masked", "throughput", "attention"])
def test_a_piece_runs_on_a_cpu_as_far_as_it_goes(name, tmp_path):
    if name in ("vicreg_loss", "throughput"):
        pytest.importorskip("lightly", reason="a peer to measure against: pip install -e '.[benchmarks]'")
    minutes, arguments = gpu.pieces_of(tmp_path, "cpu")[name]
    small = {
        "vicreg_loss": ["--num_samples", "64", "--dimensions", "128", "--processes", "1", "--repeats", "2"],
        "masked": ["--patches", "256", "--batch_size", "1", "--num_hidden_layers", "1", "--repeats", "1"],
        "throughput": ["--repeats", "1", "--view_images", "4", "--batch_size", "16", "--view_size", "64"],
        "attention": ["--sides", "16", "--repeats", "2"],
    }
    record = gpu.run_pieces({name: (minutes, [*arguments, *small[name]])}, tmp_path, time.monotonic() + 400)
    assert record[name]["code"] == 0, record[name]["said"]
    assert record[name]["figures"]["rows"]
