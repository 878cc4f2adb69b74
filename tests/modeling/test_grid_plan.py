"""What is made for a grid is made once, bounded, dropped with its model, and ordinary whatever mode is on."""

import copy
import gc
import pickle
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_vicreg import BigBirdViTConfig, BigBirdViTModel
from hf_vicreg.modeling import pattern_tables
from hf_vicreg.modeling.bigbird_pattern import block_pattern
from hf_vicreg.modeling.bigbird_positions import rotary_tables
from hf_vicreg.modeling.block_sparse_attention import visible_spans
from hf_vicreg.modeling.dense_attention import dense_bias
from hf_vicreg.modeling.flex_block_attention import flex_tables
from hf_vicreg.modeling.gathered_attention import gathered_tables
from hf_vicreg.modeling.grid_plan import PatternCache, grid_plan
from hf_vicreg.modeling.pattern_tables import derived

CPU = torch.device("cpu")
MAKERS = {
    "dense": (dense_bias, torch.float32, CPU),
    "spans": (visible_spans,),
    "gathered": (gathered_tables, 2, CPU),
    "flex": (flex_tables, 64, CPU),
    "plan": (grid_plan, 8, 100.0, CPU),
}
MODES = {
    "inference": torch.inference_mode,
    "fake": FakeTensorMode,
    "default-device": lambda: torch.device("meta"),
}


def make_model(**changes):
    settings = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "image_size": 32,
        "patch_size": 4,
        "tile_size": 2,
        "num_random_blocks": 1,
    }
    return BigBirdViTModel(BigBirdViTConfig(**settings | changes)).eval()


def tensors_of(value):
    """Every tensor in a tensor, a tuple or None."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [] if value is None else [one for part in value for one in tensors_of(part)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MAKERS)
def test_tables_are_ordinary_tensors_whatever_mode_is_on(name, mode):
    with MODES[mode]():
        found = tensors_of(derived(block_pattern(6, 10, tile_size=(2, 4), num_global_tiles=1), *MAKERS[name]))
    expected = tensors_of(derived(block_pattern(6, 10, tile_size=(2, 4), num_global_tiles=1), *MAKERS[name]))
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert type(one) is torch.Tensor
        assert not one.is_inference()
        assert torch.equal(one, other)


def test_tables_first_made_for_gradients_of_samples_serve_others():
    model, images = make_model(), torch.randn(3, 3, 32, 32)
    parameters = dict(model.named_parameters())

    def loss(parameters, image):
        return torch.func.functional_call(model, parameters, (image[None],)).pooler_output.square().sum()

    model.set_attn_implementation("eager")
    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, images)
    name = "layernorm.weight"
    for index, image in enumerate(images):
        expected = torch.autograd.grad(loss(parameters, image), parameters[name])[0]
        torch.testing.assert_close(found[name][index], expected, atol=1e-5, rtol=1e-4)
    tables = [one for pattern in model._fitting(32, 32) for one in tensors_of(tuple(pattern._kept.values()))]
    assert len(tables) == 6  # a mask for each layer, orders and rotary tables
    assert not any(torch._C._functorch.is_functorch_wrapped_tensor(one) for one in tables)


def test_a_plan_goes_to_tiles_and_back_and_turns_patches_by_their_place():
    pattern = block_pattern(6, 10, tile_size=(2, 4), num_global_tokens=3)
    plan = derived(pattern, grid_plan, 8, 100.0, CPU)
    assert plan.to_tiles[:3].tolist() == plan.to_raster[:3].tolist() == [0, 1, 2]
    assert torch.equal(plan.to_tiles[3:] - 3, pattern.order)
    assert torch.equal(plan.to_tiles[plan.to_raster], torch.arange(63))
    for found, expected in zip(plan.rotary, rotary_tables(8, 100.0, None, 6, 10, CPU), strict=True):
        assert torch.equal(found[:, :, 3:], expected[:, :, pattern.order])
    assert plan.kept is None
    raster = derived(block_pattern(6, 10, layout="raster", block_size=8), grid_plan, 8, None, CPU)
    assert raster == (None, None, None, None)


def test_a_grid_is_made_once_and_follows_the_configuration():
    model, images = make_model(), torch.zeros(1, 3, 32, 32)
    model(images)
    made = model._fitting(32, 32)
    tables = [id(one) for pattern in made for one in tensors_of(tuple(pattern._kept.values()))]
    model(images)
    assert all(one is other for one, other in zip(model._fitting(32, 32), made, strict=True))
    assert tables == [id(one) for pattern in made for one in tensors_of(tuple(pattern._kept.values()))]
    model.config.num_random_blocks = 2
    assert model.attention_patterns(32, 32)[0].density > made[0].density
    model.config.num_random_blocks = 1
    assert model._fitting(32, 32)[0] is made[0]


def test_layers_of_equal_patterns_share_their_tables():
    for changes in ({"num_random_blocks": 0}, {"attention_type": "original_full"}):
        patterns = make_model(**changes).attention_patterns(32, 32)
        assert patterns[0] is patterns[1]
    patterns = make_model().attention_patterns(32, 32)
    assert patterns[0] is not patterns[1]


def test_the_oldest_grids_are_forgotten_beyond_the_bound():
    cache = PatternCache(max_bytes=0)

    def ask(side):
        return cache.get(side, lambda: [block_pattern(side, side, tile_size=(2, 2))])[0]

    first = ask(8)
    assert ask(8) is first  # the latest is always kept
    assert cache.nbytes == first.nbytes
    size = derived(first, dense_bias, torch.float32, CPU).nbytes
    assert cache.nbytes >= size == 4 * 65**2
    ask(10)
    assert len(cache) == 1
    cache.max_bytes = 2**30
    ask(8), ask(10), ask(12)
    cache.max_bytes = cache.nbytes
    ask(8), ask(2)
    assert list(cache._patterns) == [12, 8, 2]  # 10 was used longest ago


def test_copies_and_pickles_of_a_model_make_their_own():
    model, images = make_model(), torch.randn(2, 3, 32, 32)
    expected = model(images).last_hidden_state
    assert model._patterns.nbytes > 4 * 65**2
    assert not [name for name in model.state_dict() if "pattern" in name]
    assert not list(model.buffers())
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(again._patterns) == 0
        assert torch.equal(again(images).last_hidden_state, expected)
        assert again._patterns is not model._patterns


def test_a_model_that_moves_leaves_no_tables_behind():
    model = make_model()
    model(torch.zeros(1, 3, 32, 32))
    model.to("meta")
    assert len(model._patterns) == 0
    assert model(torch.zeros(1, 3, 32, 32, device="meta")).pooler_output.device.type == "meta"
    pattern = model.attention_pattern(32, 32)
    assert pattern.order.device.type == "cpu"
    assert {one.device.type for one in tensors_of(tuple(pattern._kept.values()))} == {"meta"}


def test_threads_share_what_one_of_them_makes():
    model, barrier = make_model(), threading.Barrier(8)

    def ask(_):
        barrier.wait()
        return model.attention_patterns(160, 164)[1]

    with ThreadPoolExecutor(8) as threads:
        assert len({id(one) for one in threads.map(ask, range(8))}) == 1


def test_what_cannot_be_made_is_asked_for_again():
    cache = PatternCache()
    for _ in range(2):
        with pytest.raises(ValueError, match="`tile_size`"):
            cache.get("key", lambda: [block_pattern(2, 2, tile_size=(0, 0))])
    assert len(cache.get("key", lambda: [block_pattern(2, 2)])) == 1


def test_two_models_keep_their_fitting():
    one, other = make_model(attention_seed=1), make_model(attention_seed=2)
    other.load_state_dict(one.state_dict())
    images = torch.randn(1, 3, 32, 32)
    first, second = one(images).pooler_output, other(images).pooler_output
    assert not torch.equal(first, second)
    assert torch.equal(one(images).pooler_output, first)
    assert torch.equal(other(images).pooler_output, second)


def test_patterns_go_with_their_model():
    model = make_model()
    model(torch.zeros(1, 3, 32, 32))
    pattern = weakref.ref(model.attention_pattern(32, 32))
    number = int(pattern()._handle)
    assert pattern_tables._ALIVE[number] is pattern()
    gc.disable()
    try:
        model._patterns.clear()
        assert pattern() is None  # at once, not by the garbage collector
    finally:
        gc.enable()
    assert number not in pattern_tables._ALIVE


@pytest.mark.slow
@pytest.mark.parametrize("count", [100, 1000])
def test_models_leave_no_memory_behind(count):
    code = """
import gc, sys, torch
from hf_vicreg import BigBirdViTConfig, BigBirdViTModel

def resident():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def run(seed):
    settings = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    grid = {"image_size": 48, "patch_size": 4, "tile_size": 2, "num_random_blocks": 2, "attention_seed": seed}
    model = BigBirdViTModel(BigBirdViTConfig(**settings, **grid)).eval()
    patterns = model.attention_patterns(48, 48)
    alone = [one.with_neighbours((one.neighbours + seed).remainder(36)[..., :1]) for one in patterns]
    with torch.no_grad():  # masks of 145 x 145 numbers, its own and the injected one's
        model(torch.zeros(1, 3, 48, 48))
        model(torch.zeros(1, 3, 48, 48), attention_patterns=alone)

for seed in range(50):
    run(seed)
before = resident()
for seed in range(50, 50 + int(sys.argv[1])):
    run(seed)
print((resident() - before) / 2**20)
"""
    finished = subprocess.run([sys.executable, "-c", code, str(count)], capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    assert float(finished.stdout) < 0.05 * count  # megabytes; each model has held several times as much
