"""What only a GPU can run: FlexAttention's backward pass, the gathered path, bf16, NCCL. Skipped without one."""

import pytest
import torch

from hf_vicreg import BigBirdViTConfig, BigBirdViTModel, VicRegConfig, VicRegForPreTraining
from hf_vicreg.modeling import bigbird_attention
from hf_vicreg.modeling.bigbird_pattern import block_pattern
from hf_vicreg.modeling.dense_attention import dense_attention
from hf_vicreg.modeling.flex_block_attention import flex_block_attention
from hf_vicreg.modeling.gathered_attention import gathered_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SETTINGS = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 192,
    "image_size": 64,
    "patch_size": 4,
    "tile_size": 4,
    "num_register_tokens": 2,
}
# the precise form's rounding, and bf16's of about 2**-8 a number
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1.5e-2}


def relative(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("grid", [(16, 16), (19, 23), (64, 64)], ids=["16x16", "19x23", "64x64"])
@pytest.mark.parametrize("attend", [flex_block_attention, gathered_attention], ids=["flex", "gathered"])
def test_outputs_and_gradients_equal_the_dense_form(attend, grid, padded, dtype):
    torch.backends.cuda.matmul.allow_tf32 = False
    pattern = block_pattern(*grid, tile_size=(4, 8), num_global_tiles=1, num_global_tokens=3)
    drawn = [torch.randn(2, 2, pattern.num_tokens, 64, device="cuda") for _ in range(4)]
    key_valid = None
    if padded:
        key_valid = torch.rand(2, pattern.num_tokens, device="cuda") < 0.7
        drawn[3] = drawn[3] * key_valid[:, None, :, None]

    def run(function, kind):
        leaves = [one.to(kind).requires_grad_() for one in drawn[:3]]
        output = function(*leaves, key_valid, pattern=pattern, scaling=0.125)
        return output.detach() * (drawn[3] != 0), torch.autograd.grad((output * drawn[3].to(kind)).sum(), leaves)

    expected, wanted = run(dense_attention, torch.float64)
    found, gradients = run(attend, dtype)
    assert relative(found, expected) < TOLERANCE[dtype]
    for one, other in zip(gradients, wanted, strict=True):
        assert relative(one, other) < TOLERANCE[dtype]


@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_model_trains_as_on_a_cpu(implementation, compiled, monkeypatch):
    monkeypatch.setattr(bigbird_attention, "PAIR_COST", 0)
    monkeypatch.setattr(bigbird_attention, "TILE_COST", 0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model = VicRegForPreTraining(VicRegConfig(encoder=BigBirdViTConfig(**SETTINGS), expander_sizes=[64, 64]))
    views = torch.randn(8, 2, 3, 64, 64)
    expected = model(views).loss
    wanted = torch.autograd.grad(expected, list(model.encoder.layernorm.parameters()))
    model.cuda().set_attn_implementation(implementation)
    if compiled:
        model.encoder.compile()
    found = model(views.cuda()).loss
    gradients = torch.autograd.grad(found, list(model.encoder.layernorm.parameters()))
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)
    assert relative(gradients[0].cpu(), wanted[0].double()) < 1e-2


def test_many_grids_stay_compiled():
    model = BigBirdViTModel(BigBirdViTConfig(**SETTINGS)).cuda().eval()
    for side in range(16, 16 + 4 * 12, 4):
        pixel_values = torch.randn(1, 3, 4 * side, 4 * side, device="cuda")
        with torch.no_grad():
            model.set_attn_implementation("sdpa")
            expected = model(pixel_values).pooler_output.double()
            model.set_attn_implementation("flex_attention")
            assert relative(model(pixel_values).pooler_output, expected) < 5e-3


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_model_split_over_devices(tmp_path):
    BigBirdViTModel(BigBirdViTConfig(**SETTINGS)).save_pretrained(tmp_path)
    whole = BigBirdViTModel.from_pretrained(tmp_path).eval()
    places = {"embeddings": 0, "encoder.layer.0": 0, "encoder.layer.1": 1, "layernorm": 1}
    split = BigBirdViTModel.from_pretrained(tmp_path, device_map=places).eval()
    pixel_values = torch.randn(2, 3, 52, 60)
    found = split(pixel_values.cuda(), output_hidden_states=True)
    assert relative(found.pooler_output.cpu(), whole(pixel_values).pooler_output.double()) < 5e-3


@pytest.mark.distributed
def test_nccl_gives_the_loss_of_one_process(tmp_path):
    import torch.distributed as dist

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        model = VicRegForPreTraining(VicRegConfig(encoder=BigBirdViTConfig(**SETTINGS), expander_sizes=[64, 64]))
        model.cuda().train()
        views = torch.randn(8, 2, 3, 64, 64, device="cuda")
        within = model(views).loss.item()
    finally:
        dist.destroy_process_group()
    assert within == pytest.approx(model(views).loss.item(), rel=1e-4)
