"""Learning from a teacher: the error's formula and its gradient, what it leaves alone, and runs that have one."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file
from transformers import AutoModel, BertConfig, BertModel, Dinov2Config, Dinov2Model, ResNetConfig, ResNetModel

from hf_vicreg import BigBirdViTImageProcessor, VicRegConfig, VicRegForPreTraining, embed, pretrain
from hf_vicreg.modeling.modeling_vicreg import pooled_features
from hf_vicreg.modeling.taught import Taught, TaughtByFeatures, pooled_error, token_error
from hf_vicreg.training.engine.two_pass import two_pass_backward
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.monitor.run_log import LOG_FILE, read_log

SHAPE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
ENCODER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
ENCODER |= {"image_size": 24, "patch_size": 4, "tile_size": 1}
PLAIN = ([0.0] * 3, [1.0] * 3)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Folders of a ViT with an image processor of its own, of a convolutional network, and of a model of texts."""
    folder = tmp_path_factory.mktemp("teachers")
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(initializer_range=0.2, **SHAPE)).save_pretrained(folder / "vit")
    size = {"height": 32, "width": 32}
    BigBirdViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(folder / "vit")
    net = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]))
    net.save_pretrained(folder / "net")
    BigBirdViTImageProcessor(size=size).save_pretrained(folder / "net")
    Dinov2Model(Dinov2Config(num_channels=1, **SHAPE)).save_pretrained(folder / "grey")
    BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)).save_pretrained(
        folder / "bert"
    )
    return folder


def taught(teacher, *, with_tokens=True, weight=3.0):
    torch.manual_seed(1)
    model = VicRegForPreTraining(VicRegConfig(encoder=ENCODER, expander_sizes=[16, 16])).double().train()
    model.objective = Taught(
        model.objective,
        teacher.double(),
        (16, teacher.config.hidden_size),
        weight=weight,
        normalisation=([0.5] * 3, [0.25] * 3),
        own_normalisation=PLAIN,
        with_tokens=with_tokens,
        image_size=(32, 32),
    ).double()
    return model


def taught_by_features(teacher):
    torch.manual_seed(1)
    model = VicRegForPreTraining(VicRegConfig(encoder=ENCODER, expander_sizes=[16, 16])).double().train()
    features = torch.randn(9, 24, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    model.objective = TaughtByFeatures(model.objective, features, 16, weight=3.0).double()
    return model


ORDER = torch.tensor([4, 0, 8, 1, 1, 5])  # of the images of a step among those that there are


def images(count=6):
    generator = torch.Generator().manual_seed(3)
    return torch.rand(count, 2, 3, 24, 24, generator=generator, dtype=torch.float64)


def expected_error(model, teacher, pixel_values):
    """The definition, written out view by view."""
    total = 0.0
    for view in range(2):
        own = pixel_values[:, view]
        seen = F.interpolate((own - 0.5) / 0.25, (32, 32), mode="bilinear", antialias=True)
        with torch.no_grad():
            outputs = teacher(seen)
        student = model.encoder(own)
        pooled = outputs.pooler_output
        wanted = (pooled - pooled.mean(0)) / (pooled.var(0, unbiased=False) + 1e-5).sqrt()
        total = total + (model.objective.pooled_map(student.pooler_output) - wanted).pow(2).mean() / 2
        tokens = outputs.last_hidden_state[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
        tokens = F.interpolate(tokens.float(), (6, 6), mode="bilinear", antialias=True).permute(0, 2, 3, 1)
        tokens = (tokens - tokens.mean(-1, keepdim=True)) / (
            tokens.var(-1, unbiased=False, keepdim=True) + 1e-5
        ).sqrt()
        mine = model.objective.token_map(student.last_hidden_state[:, 1:]).unflatten(1, (6, 6))
        total = total + (mine - tokens).pow(2).mean() / 2
    return total


def test_loss_and_gradient_are_those_of_the_definition(teachers):
    teacher = AutoModel.from_pretrained(teachers / "vit").eval()
    model, pixel_values = taught(teacher), images()
    outputs = model(pixel_values=pixel_values)
    inner = model.objective.inner
    assert outputs.teacher_error.item() == pytest.approx(expected_error(model, teacher, pixel_values).item(), rel=1e-5)
    found = torch.autograd.grad(outputs.loss, list(model.parameters()), allow_unused=True)
    model.objective, kept = inner, model.objective
    plain = model(pixel_values=pixel_values).loss
    model.objective = kept
    expected = plain + 3.0 * expected_error(model, teacher, pixel_values)
    wanted = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    total = torch.stack([one.norm() for one in wanted if one is not None]).norm()
    for (name, _), one, other in zip(model.named_parameters(), found, wanted, strict=True):
        if other is not None:
            assert (one - other).norm() <= 1e-5 * total, name
    assert not any(one.requires_grad or one.grad is not None for one in teacher.parameters())
    assert not [name for name in model.state_dict() if "teacher" in name or "kept" in name]


def test_stored_features_have_the_loss_and_the_gradient_of_the_definition():
    model, pixel_values = taught_by_features(None), images()
    model.objective.see(ORDER)
    outputs = model(pixel_values=pixel_values)
    found = torch.autograd.grad(outputs.loss, list(model.parameters()), allow_unused=True)
    objective = model.objective
    wanted = objective.stored[0][ORDER]
    wanted = (wanted - wanted.mean(0)) / (wanted.var(0, unbiased=False) + 1e-5).sqrt()
    error = sum(
        (objective.pooled_map(model.encoder(pixel_values[:, view]).pooler_output) - wanted).pow(2).mean() / 2
        for view in range(2)
    )
    assert outputs.teacher_error.item() == pytest.approx(error.item(), rel=1e-5)
    model.objective = objective.inner
    expected = model(pixel_values=pixel_values).loss + 3.0 * error
    model.objective = objective
    gradients = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    total = torch.stack([one.norm() for one in gradients if one is not None]).norm()
    for (name, _), one, other in zip(model.named_parameters(), found, gradients, strict=True):
        if other is not None:
            assert (one - other).norm() <= 1e-5 * total, name
    pieces = [lambda piece=piece: {"pixel_values": piece} for piece in pixel_values.chunk(3)]
    two_pass_backward(model, pieces, torch.Tensor.backward)
    for (name, parameter), one in zip(model.named_parameters(), gradients, strict=True):
        if one is not None:
            assert (parameter.grad - one).norm() <= 1e-5 * total, name
    assert not [name for name in model.state_dict() if "stored" in name]


def test_pieces_have_the_gradient_of_the_whole(teachers):
    teacher, gradients, losses = AutoModel.from_pretrained(teachers / "vit").eval(), [], []
    for parts in (1, 3):
        model = taught(teacher)
        pieces = [lambda piece=piece: {"pixel_values": piece} for piece in images().chunk(parts)]
        losses.append(two_pass_backward(model, pieces, torch.Tensor.backward).loss.item())
        gradients.append(torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert (gradients[1] - gradients[0]).norm() <= 1e-6 * gradients[0].norm()


PROGRAM = """
import importlib.util, os, sys
import torch
from accelerate import PartialState
from safetensors.torch import save_file
from transformers import AutoModel
specification = importlib.util.spec_from_file_location("test_teacher", sys.argv[1])
test = importlib.util.module_from_spec(specification)
specification.loader.exec_module(test)
from hf_vicreg.training.engine.two_pass import average_gradients, two_pass_backward
state = PartialState(cpu=True)
assert state.num_processes == 2
model = getattr(test, sys.argv[4])(AutoModel.from_pretrained(sys.argv[2]).eval())
share = test.images(6).chunk(2)[state.process_index]
if sys.argv[4] == "taught_by_features":
    model.objective.see(test.ORDER.chunk(2)[state.process_index])
outputs = two_pass_backward(model, [lambda: {"pixel_values": share}], torch.Tensor.backward)
average_gradients(model.parameters())
gradient = torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])
if state.is_main_process:
    save_file({"gradient": gradient, "loss": outputs.loss.detach(), "world": torch.tensor(2)}, sys.argv[3])
state.wait_for_everyone()
state.destroy_process_group()
"""


@pytest.mark.distributed
@pytest.mark.parametrize("maker", ["taught", "taught_by_features"])
def test_two_processes_have_the_gradient_of_one(maker, teachers, ranks, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = ranks(2, program, __file__, teachers / "vit", tmp_path / "found.safetensors", maker)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "found.safetensors")
    assert found["world"] == 2
    model = globals()[maker](AutoModel.from_pretrained(teachers / "vit").eval())
    if maker == "taught_by_features":
        model.objective.see(ORDER)
    outputs = two_pass_backward(model, [lambda: {"pixel_values": images()}], torch.Tensor.backward)
    gradient = torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])
    assert found["loss"].item() == pytest.approx(outputs.loss.item(), rel=1e-5)  # its error is of single precision
    assert (found["gradient"] - gradient).norm() <= 1e-5 * gradient.norm()


def test_the_errors_are_zero_for_a_prediction_that_is_right():
    target = torch.randn(7, 5, dtype=torch.float64)
    right = (target - target.mean(0)) / (target.var(0, unbiased=False) + 1e-5).sqrt()
    assert pooled_error(right, target) < 1e-10
    assert pooled_error(torch.zeros_like(target), target).item() == pytest.approx(1, rel=1e-3)
    tokens = torch.randn(2, 3, 4, 6)
    assert token_error(F.layer_norm(tokens, (6,)), tokens).max() < 1e-10
    assert token_error(torch.zeros(2, 5, 7, 6), tokens).shape == (2,)


@pytest.mark.parametrize("name", ["vit", pytest.param("net", marks=pytest.mark.slow)])
def test_a_taught_run_resumes_and_leaves_nothing_of_its_teacher(name, teachers, tiny_recipe, image_folder, tmp_path):
    data = image_folder(32)
    settings = tiny_recipe | {"batch_size": 16, "num_train_epochs": 2, "checkpointing_steps": 2}
    settings |= {"teacher": str(teachers / name), "statistics_batch_size": 32}
    whole = pretrain(out=tmp_path / "whole", data=data, **settings | {"num_train_epochs": 4})
    lines = (tmp_path / "whole" / "log.jsonl").read_text()
    assert "teacher_error" in lines
    wrapper = VicRegForPreTraining.from_pretrained(tmp_path / "whole" / "pretraining")
    assert not [one for one in wrapper.state_dict() if "map" in one or "inner" in one]
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "taught by" in card
    assert str(teachers) not in card
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step_00000004")
    again = pretrain(
        out=tmp_path / "again", data=data, resume_from_checkpoint="latest", **settings | {"num_train_epochs": 4}
    )
    for key, tensor in whole.encoder.state_dict().items():
        assert torch.equal(again.encoder.state_dict()[key], tensor), key
    plain = pretrain(out=tmp_path / "plain", data=data, **settings | {"num_train_epochs": 4, "teacher": None})
    assert any(
        not torch.equal(tensor, plain.encoder.state_dict()[key]) for key, tensor in whole.encoder.state_dict().items()
    )
    assert pooled_features(AutoModel.from_pretrained(tmp_path / "whole")(torch.zeros(1, 3, 32, 32))).shape == (1, 32)


@pytest.mark.parametrize(
    ("precision", "compiled"),
    [
        ("bf16", False),
        pytest.param("no", True, marks=pytest.mark.slow),
        pytest.param("bf16", True, marks=pytest.mark.slow),
    ],
)
def test_a_teacher_works_in_bf16_and_compiled(precision, compiled, teachers, tiny_recipe, image_folder, tmp_path):
    settings = tiny_recipe | {"data": image_folder(40), "max_steps": 3, "teacher": str(teachers / "vit")}
    plain = pretrain(out=tmp_path / "plain", **settings, mixed_precision="no")
    for state in (AcceleratorState, PartialState):  # accelerate keeps one precision a process
        state._reset_state()
    other = pretrain(out=tmp_path / "other", **settings, mixed_precision=precision, torch_compile=compiled)
    losses = [read_log(one.output_dir / LOG_FILE) for one in (plain, other)]
    assert len(losses[0]) == len(losses[1]) == 3
    for one, two in zip(*losses, strict=True):
        assert two["teacher_error"] == pytest.approx(one["teacher_error"], rel=0.05)
        assert two["loss"] == pytest.approx(one["loss"], rel=0.05)
    assert not any("teacher" in name for name in load_file(other.output_dir / "model.safetensors"))
    for state in (AcceleratorState, PartialState):
        state._reset_state()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "bert"}, "`teacher`: expected a vision encoder, got .*bert' of type 'bert'"),
        ({"teacher": "nowhere"}, "`teacher`: expected the folder or Hub id of a vision model in safetensors form"),
        ({"teacher": "grey"}, "`teacher`"),
        ({"teacher": "vit", "teacher_weight": -1.0}, "`teacher_weight`: expected at least 0, got -1"),
        ({"teacher": "vit", "second_model": ENCODER | {"image_size": 32}}, "`teacher`: expected one encoder that"),
    ],
    ids=["text", "nowhere", "channels", "weight", "two-branches"],
)
def test_what_teaches_nothing_is_refused(changes, message, teachers, tiny_recipe, image_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(teachers)
    with pytest.raises(InputError, match=message):
        pretrain(out=tmp_path / "run", data=image_folder(32), **tiny_recipe | {"batch_size": 16} | changes)
    assert not (tmp_path / "run").exists()


def test_a_run_learns_from_stored_features_and_resumes(teachers, tiny_recipe, image_folder, tmp_path, caplog):
    data = image_folder(32)
    (data / "0007.png").write_bytes(b"broken")
    embed(data, teachers / "vit", out=tmp_path / "features")
    caplog.set_level("INFO")
    settings = tiny_recipe | {"batch_size": 16, "num_train_epochs": 4, "checkpointing_steps": 2}
    settings |= {"teacher_features": str(tmp_path / "features"), "statistics_batch_size": 32, "teacher_weight": 5.0}
    whole = pretrain(out=tmp_path / "whole", data=data, **settings)
    assert "learns to predict 24 features of features" in caplog.text
    assert "1 images have no features" in caplog.text
    errors = [one["teacher_error"] for one in read_log(tmp_path / "whole" / LOG_FILE) if "teacher_error" in one]
    assert all(error > 0 for error in errors)
    wrapper = VicRegForPreTraining.from_pretrained(tmp_path / "whole" / "pretraining")
    assert not [one for one in wrapper.state_dict() if "map" in one or "inner" in one]
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "| taught by | stored features, `features`, weight `5.0` |" in card
    assert str(tmp_path) not in card
    plain = pretrain(
        out=tmp_path / "plain",
        data=data,
        **{key: one for key, one in settings.items() if not key.startswith("teacher")},
    )
    assert not torch.equal(
        torch.cat([one.flatten() for one in plain.encoder.state_dict().values()]),
        torch.cat([one.flatten() for one in whole.encoder.state_dict().values()]),
    )
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step_00000004")
    resumed = pretrain(out=tmp_path / "again", data=data, resume_from_checkpoint="latest", **settings)
    for key, tensor in whole.encoder.state_dict().items():
        assert torch.equal(resumed.encoder.state_dict()[key], tensor), key


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("nowhere", "`teacher_features`: expected a folder of `hf-vicreg embed IMAGES TEACHER FOLDER`, got"),
        ("unfinished", "`teacher_features`: expected finished ones, found only a part"),
        ("others", "`teacher_features`: expected those of the 32 images of images .* is another one or missing"),
        ("more", "`teacher_features`: expected those of the 40 images of more"),
        ("both", "`teacher`, `teacher_features`: expected one of the two"),
    ],
)
def test_features_that_teach_nothing_are_refused(case, message, teachers, tiny_recipe, image_folder, tmp_path):
    data, folder = image_folder(32), tmp_path / "features"
    embed(data, teachers / "vit", out=folder)
    settings = tiny_recipe | {"batch_size": 16, "teacher_features": str(folder)}
    if case == "nowhere":
        settings["teacher_features"] = str(tmp_path / "nowhere")
    elif case == "unfinished":
        record = json.loads((folder / "embedding.json").read_text())
        del record["num_rows"]
        (folder / "embedding.json").write_text(json.dumps(record))
    elif case == "others":
        (data / "0003.png").write_bytes((data / "0004.png").read_bytes())
    elif case == "more":
        data = image_folder(40, name="more")
    else:
        settings["teacher"] = str(teachers / "vit")
    with pytest.raises(InputError, match=message):
        pretrain(out=tmp_path / "run", data=data, **settings)
    assert not (tmp_path / "run").exists()
