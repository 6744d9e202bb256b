"""The bundled digits, folders in ImageNet's layout, and which image comes when."""

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import CLASSES, NUM_TRAIN, NUM_VAL
from torch.utils.data.distributed import DistributedSampler

from vgglab.config import parse
from vgglab.data import loader
from vgglab.data.digits import digits_folder
from vgglab.data.sets import open_sets


def rank(number=0, of=1):
    return SimpleNamespace(
        rank=number, world_size=of, worker_start="fork", pins_memory=False, sampler=DistributedSampler
    )


def test_digits_lie_in_imagenets_layout_with_lists_that_tell_the_truth():
    root = digits_folder()
    sizes = {}
    for split in ("train", "val"):
        lines = (root / f"{split}_list.txt").read_text().splitlines()
        for line in lines:
            path, label = line.split()
            assert path.split("/")[0] == label
        listed = sorted(line.split()[0] for line in lines)
        assert listed == sorted(str(f.relative_to(root / split)) for f in (root / split).glob("*/*.png"))
        sizes[split] = len(listed)
    assert sizes == {"train": 1437, "val": 360}
    assert digits_folder() == root  # written once


def test_two_processes_may_write_the_digits_at_once(tmp_path):
    code = "from vgglab.data.digits import digits_folder as f; print(len(list(f().glob('*/*/*.png'))))"
    environment = {**os.environ, "VGGLAB_CACHE": str(tmp_path)}
    both = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate()[0].strip() for process in both] == ["1797", "1797"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["digits-1"]  # nothing half-done is left


def test_a_folder_is_read_in_sorted_order_without_hidden_files(images):
    (images / "train" / ".ipynb_checkpoints").mkdir()
    shutil.copy(images / "train/n01/n01_0.JPEG", images / "train/.ipynb_checkpoints/n01_0.JPEG")
    shutil.copy(images / "train/n01/n01_0.JPEG", images / "train/n01/._n01_0.JPEG")
    sets = open_sets(parse([f"--data-path={images}"]))
    assert sets.train.classes == sets.val.classes == list(CLASSES)
    assert list(sets.train.labels) == [label for label in range(3) for _ in range(NUM_TRAIN)]
    assert (len(sets.train), len(sets.val), sets.num_classes) == (3 * NUM_TRAIN, 3 * NUM_VAL, 3)


def test_a_class_missing_from_val_keeps_the_labels_of_the_others(images):
    shutil.rmtree(images / "val" / CLASSES[0])
    sets = open_sets(parse([f"--data-path={images}"]))
    assert sorted(set(sets.val.labels)) == [1, 2]


def all_picks(picks, epoch=0):
    picks.epoch = epoch
    return [list(batch) for batch in picks]


def test_two_ranks_see_together_what_one_sees_alone():
    alone = all_picks(loader.TrainPicks(50, 8, rank(), seed=3), epoch=2)
    first = all_picks(loader.TrainPicks(50, 4, rank(0, 2), seed=3), epoch=2)
    second = all_picks(loader.TrainPicks(50, 4, rank(1, 2), seed=3), epoch=2)
    assert [sorted(a + b) for a, b in zip(first, second)] == [sorted(batch) for batch in alone]
    assert len(alone) == len(first) == 6  # 50 images: the last two are left out, this epoch


def test_every_epoch_and_seed_has_an_order_and_crops_of_its_own():
    orders = {str(all_picks(loader.TrainPicks(50, 8, rank(), seed), epoch)) for seed in (1, 2) for epoch in (0, 1)}
    assert len(orders) == 4
    seeds = [pick.seed for batch in all_picks(loader.TrainPicks(50, 8, rank(), 2**31)) for pick in batch]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_held_out_images_count_once_on_any_number_of_ranks(num_ranks):
    seen = []
    for number in range(num_ranks):
        seen += [pick.image for batch in loader.EvalPicks(10, 4, rank(number, num_ranks)) for pick in batch]
    assert sorted(seen) == list(range(10))


def test_batches_do_not_depend_on_the_number_of_workers(images):
    def pixels(workers):
        config = parse(
            [f"--data-path={images}", "--batch-size=4", "--image-size=32", f"--workers={workers}", "--seed=5"]
        )
        batches = loader.train_batches(open_sets(config), config, rank())
        return [(b.images.sum().item(), b.labels.tolist()) for epoch in (0, 1) for b in batches.epoch(epoch)]

    alone = pixels(0)
    assert len(set(map(str, alone))) == len(alone)  # the crops do differ
    assert pixels(2) == alone
