"""Order of the images, their views, and what stands in for unusable ones."""

import pytest
import torch
from torch.utils.data import DataLoader

from hf_vicreg.training.images.order import StepSampler, ViewDataset, collate
from hf_vicreg.training.images.sources import load_sources
from hf_vicreg.training.images.views import ViewSampler
from hf_vicreg.training.run.arguments import ViewsConfig


def views_of(source, workers=0, first_step=0, rank=0, world_size=1, steps=6, batch_size=8):
    dataset = ViewDataset(source, ViewSampler.of_views(ViewsConfig(), (16, 16)), seed=3)
    sampler = StepSampler(len(source), batch_size, 3, first_step, steps, rank, world_size)
    return list(DataLoader(dataset, batch_sampler=sampler, num_workers=workers, collate_fn=collate))


def test_order_of_each_epoch_is_a_permutation():
    keys = [key for batch in StepSampler(20, 4, 0, 0, 10, 0, 1) for key in batch]
    for epoch in range(2):
        assert sorted(index for which, index in keys if which == epoch) == list(range(20))
    assert keys[:20] != [(0, index) for _, index in keys[20:]]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_batches_are_the_same_images_whatever_the_world_size(world_size):
    whole = list(StepSampler(22, 8, 1, 0, 5, 0, 1))
    shares = [list(StepSampler(22, 8, 1, 0, 5, rank, world_size)) for rank in range(world_size)]
    for step in range(5):
        assert [key for share in shares for key in share[step]] == whole[step]


@pytest.mark.parametrize("world_size", [1, 2])
def test_pieces_of_a_batch_are_the_batch(world_size):
    for rank in range(world_size):
        whole = list(StepSampler(22, 8, 1, 1, 5, rank, world_size))
        pieces = StepSampler(22, 8, 1, 1, 5, rank, world_size, pieces=4 // world_size)
        assert len(pieces) == len(whole) * (4 // world_size)
        assert [key for piece in pieces for key in piece] == [key for batch in whole for key in batch]
        assert {len(piece) for piece in pieces} == {2}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a single core
@pytest.mark.parametrize("workers", [0, 2])
def test_samples_depend_on_their_key_alone(image_folder, workers):
    source, _ = load_sources(train_dir=str(image_folder(20)))
    whole = views_of(source)
    resumed = views_of(source, workers=workers, first_step=3)
    halves = [views_of(source, rank=rank, world_size=2) for rank in range(2)]
    for step in range(3, 6):
        assert torch.equal(resumed[step - 3]["views"], whole[step]["views"])
        assert torch.equal(resumed[step - 3]["colours"], whole[step]["colours"])
        assert torch.equal(torch.cat([half[step]["views"] for half in halves]), whole[step]["views"])
    assert not torch.equal(whole[0]["views"][:, 0], whole[0]["views"][:, 1])


def test_corrupt_images_are_replaced_and_counted(image_folder):
    folder = image_folder(20)
    good = folder / "0003.png"
    content = good.read_bytes()
    bad = {4: content[:80], 5: b"", 11: b"not an image at all"}
    for index, data in bad.items():
        (folder / f"{index:04d}.png").write_bytes(data)
    source, _ = load_sources(train_dir=str(folder))
    batches = views_of(source, steps=4, batch_size=10)  # two epochs, every image
    assert {index for batch in batches for index in batch["unusable"]} == set(bad)
    assert all(batch["views"].shape == (10, 2, 3, 16, 16) for batch in batches)


def test_many_broken_neighbours_do_not_end_a_run(image_folder):
    folder = image_folder(100)
    for index in range(20, 95):
        (folder / f"{index:04d}.png").write_bytes(b"broken")
    source, _ = load_sources(train_dir=str(folder))
    batches = views_of(source, steps=10, batch_size=10)
    assert all(batch["views"] is not None for batch in batches)


def test_all_corrupt_gives_no_views(tmp_path):
    for index in range(3):
        (tmp_path / f"{index}.jpg").write_bytes(b"x")
    source, _ = load_sources(train_dir=str(tmp_path))
    assert views_of(source, steps=1, batch_size=2)[0]["views"] is None


def test_a_file_that_disappears_is_replaced_and_counted(image_folder):
    folder = image_folder(20)
    source, _ = load_sources(train_dir=str(folder))
    dataset = ViewDataset(source, ViewSampler.of_views(ViewsConfig(), (16, 16)), seed=3)
    loader = DataLoader(dataset, batch_sampler=StepSampler(20, 10, 3, 0, 4, 0, 1, 1), collate_fn=collate)
    batches = iter(loader)
    before = [next(batches) for _ in range(2)]  # one epoch
    (folder / "0007.png").unlink()
    after = list(batches)
    assert not any(batch["unusable"] for batch in before)
    assert {index for batch in after for index in batch["unusable"]} == {7}
    assert all(batch["views"].shape == (10, 2, 3, 16, 16) for batch in after)
