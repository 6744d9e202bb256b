"""The bundled digits, folders in ImageNet's layout, and the order of the images."""

import gzip
import json
import os
import shutil
import struct
import subprocess
import sys
import urllib.error
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from conftest import CLASSES, NUM_TRAIN, NUM_VAL
from processes import python
from torch.utils.data.distributed import DistributedSampler

from vgglab.data import index, loader
from vgglab.data.digits import digits_folder
from vgglab.data.images import ArrayImages, FileImages, Split
from vgglab.data.named import NAMED_SETS, NamedSet
from vgglab.data.sets import open_sets
from vgglab.data.transform import Preprocessing
from vgglab.settings.parser import parse_flags


def rank(number=0, of=1):
    return SimpleNamespace(
        rank=number, world_size=of, worker_start="fork", pins_memory=False, sampler=DistributedSampler
    )


def test_digits_use_the_imagenet_layout_with_matching_lists():
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
    assert digits_folder() == root  # not written again


def test_two_processes_can_write_the_digits_concurrently(tmp_path):
    code = "from vgglab.data.digits import digits_folder as f; print(len(list(f().glob('*/*/*.png'))))"
    environment = {**os.environ, "VGGLAB_CACHE": str(tmp_path)}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate()[0].strip() for process in processes] == ["1797", "1797"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["digits-1"]  # no temporary files are left


def test_folder_is_read_in_sorted_order_without_hidden_files(images):
    (images / "train" / ".ipynb_checkpoints").mkdir()
    shutil.copy(images / "train/n01/n01_0.JPEG", images / "train/.ipynb_checkpoints/n01_0.JPEG")
    shutil.copy(images / "train/n01/n01_0.JPEG", images / "train/n01/._n01_0.JPEG")
    sets = open_sets(parse_flags([f"--data-path={images}"]))
    assert sets.train.classes == sets.val.classes == list(CLASSES)
    assert list(sets.train.labels) == [label for label in range(3) for _ in range(NUM_TRAIN)]
    assert (len(sets.train), len(sets.val), sets.num_classes) == (3 * NUM_TRAIN, 3 * NUM_VAL, 3)


def test_class_missing_from_val_does_not_shift_labels(images):
    shutil.rmtree(images / "val" / CLASSES[0])
    sets = open_sets(parse_flags([f"--data-path={images}"]))
    assert sorted(set(sets.val.labels)) == [1, 2]


def batches_of(sampler, epoch=0):
    sampler.epoch = epoch
    return [list(batch) for batch in sampler]


def test_two_ranks_together_get_the_batches_of_one():
    single = batches_of(loader.TrainBatchSampler(50, 8, rank(), seed=3), epoch=2)
    first = batches_of(loader.TrainBatchSampler(50, 4, rank(0, 2), seed=3), epoch=2)
    second = batches_of(loader.TrainBatchSampler(50, 4, rank(1, 2), seed=3), epoch=2)
    assert [sorted(a + b) for a, b in zip(first, second)] == [sorted(batch) for batch in single]
    assert len(single) == len(first) == 6  # of 50 images, each epoch drops the last two


def test_order_and_crops_differ_by_epoch_and_seed():
    orders = {
        str(batches_of(loader.TrainBatchSampler(50, 8, rank(), seed), epoch)) for seed in (1, 2) for epoch in (0, 1)
    }
    assert len(orders) == 4
    seeds = [sample.seed for batch in batches_of(loader.TrainBatchSampler(50, 8, rank(), 2**31)) for sample in batch]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_held_out_images_are_counted_once_on_any_number_of_ranks(num_ranks):
    indices = []
    for number in range(num_ranks):
        batches = loader.eval_sample_batches(10, 4, rank(number, num_ranks))
        indices += [sample.image for batch in batches for sample in batch]
    assert sorted(indices) == list(range(10))


def test_batches_do_not_depend_on_the_number_of_workers(images):
    def pixels(workers):
        config = parse_flags(
            [f"--data-path={images}", "--batch-size=4", "--image-size=32", f"--workers={workers}", "--seed=5"]
        )
        batches = loader.train_batches(open_sets(config), config, rank())
        return [(b.images.sum().item(), b.labels.tolist()) for epoch in (0, 1) for b in batches.epoch(epoch)]

    without_workers = pixels(0)
    assert len(set(map(str, without_workers))) == len(without_workers)  # the crops differ
    assert pixels(2) == without_workers


# Rows 9, 10 and 22 of the original example's defects: listings, classes and list files.


def listed_files(folder):
    return {name: listing.split() for name, listing in index.read_index(folder).items() if name}


def test_row_9_listing_is_never_stale(images):
    """Original: cached by the path as typed; new images were ignored, and deleted ones crashed the run."""
    folder = images / "train"
    assert list(listed_files(folder)) == ["n01", "n02", "n03"]
    shutil.copy(folder / "n02/n02_0.JPEG", folder / "n02/n02_new.JPEG")
    (folder / "n03/n03_1.JPEG").unlink()
    (folder / "n00").mkdir()
    shutil.copy(folder / "n02/n02_0.JPEG", folder / "n00/a.JPEG")
    shutil.rmtree(folder / "n01")
    after = listed_files(folder)
    assert list(after) == ["n00", "n02", "n03"]
    assert "n02_new.JPEG" in after["n02"]
    assert "n03_1.JPEG" not in after["n03"]


def test_row_9_same_relative_path_elsewhere_is_another_data_set(images, tmp_path, monkeypatch):
    monkeypatch.chdir(images.parent)
    expected = listed_files(Path("images/train"))
    other = tmp_path / "elsewhere" / "images" / "train" / "cats"
    other.mkdir(parents=True)
    shutil.copy(images / "train/n01/n01_0.JPEG", other / "cat.JPEG")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert listed_files(Path("images/train")) == {"cats": ["cat.JPEG"]}
    monkeypatch.chdir(images.parent)
    assert listed_files(Path("images/train")) == expected


def test_training_on_a_read_only_folder_works(images, train):
    folders = [images, *(folder for folder in images.rglob("*") if folder.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        assert train().code == 0
    finally:
        for folder in folders:
            folder.chmod(0o755)


def test_any_path_is_stored_unchanged():
    expected = ["a", "späß/图 片.JPEG", os.fsdecode(b"not\xffutf8"), ""]
    images = FileImages(expected)
    assert [images.name(number) for number in range(len(images))] == expected
    with pytest.raises(IndexError):
        images.name(4)


def write_lists(images, change=lambda split, lines: lines):
    for split in ("train", "val"):
        files = sorted((images / split).glob("*/*"))
        lines = [f"{file.relative_to(images / split)} {CLASSES.index(file.parent.name)}" for file in files]
        (images / f"{split}_list.txt").write_text("\n".join(change(split, lines)) + "\n")


def open_folder(images, *flags):
    return open_sets(parse_flags([f"--data-path={images}", *flags]))


@pytest.mark.parametrize("prefix", ["", "{split}/", "./"])
def test_row_22_list_files_define_the_data_set(images, prefix):
    """Original: shown in the README, but never read."""
    kept = {}

    def shorten(split, lines):
        kept[split] = lines[1::2][::-1]
        return [prefix.format(split=split) + line for line in kept[split]]

    write_lists(images, shorten)
    sets = open_folder(images)
    for split, data_set in (("train", sets.train), ("val", sets.val)):
        files = [os.path.relpath(data_set.images.name(i), images / split) for i in range(len(data_set))]
        assert [f"{file} {label}" for file, label in zip(files, data_set.labels)] == kept[split]
    assert sets.train.classes == list(CLASSES)
    num_unlisted = 3 * NUM_TRAIN - len(kept["train"])
    assert any(f"train_list.txt: {num_unlisted} image files are not listed" in text for text in sets.warnings)


def test_row_22_listed_held_out_images_need_no_class_folders(images, train):
    lines = []
    for file in sorted((images / "val").glob("*/*")):
        lines.append(f"{file.name} {CLASSES.index(file.parent.name)}")
        file.rename(images / "val" / file.name)
        if not list(file.parent.iterdir()):
            file.parent.rmdir()
    (images / "val_list.txt").write_text("\n".join(lines))
    result = train()
    assert result.run.events("eval")[0]["num_images"] == 3 * NUM_VAL
    assert not [text for text in result.run.report()["warnings"] if "list" in text]


def test_row_22_missing_listed_files_are_counted(images, refused, train):
    write_lists(images)
    (images / "train/n02/n02_1.JPEG").unlink()
    (images / "train/n03/n03_2.JPEG").unlink()
    line = refused()
    assert "train_list.txt: 2 of 18 files are missing" in line
    assert "n02/n02_1.JPEG" in line
    result = train("--on-bad-image=skip", "--batch-size=6")
    assert result.run.report()["num_skipped_images"] == 2
    assert any("2 of 18 files are missing" in text for text in result.run.report()["warnings"])


def test_row_22_labels_that_contradict_the_folders_are_reported(images):
    write_lists(images, lambda split, lines: [lines[0][:-1] + "2", *lines[1:]] if split == "train" else lines)
    assert any("1 of 18 images have a different label from most images" in t for t in open_folder(images).warnings)
    write_lists(images, lambda split, lines: [line[:-1] + str(2 - int(line[-1])) for line in lines])
    sets = open_folder(images)
    assert any("labels of 2 of 3 class folders do not follow" in text for text in sets.warnings)
    assert sets.train.classes == list(CLASSES)[::-1]
    assert list(sets.val.labels) == [2] * NUM_VAL + [1] * NUM_VAL + [0] * NUM_VAL


def test_row_10_lists_with_different_class_numbers_are_refused(images, refused):
    """Original: each folder had its own numbering, which silently gave a wrong accuracy."""
    write_lists(
        images, lambda split, lines: [line[:-1] + str((int(line[-1]) + (split == "val")) % 3) for line in lines]
    )
    assert "val_list.txt: 9 of 9 labels differ from those of the training images" in refused()
    (images / "train_list.txt").unlink()
    assert "val_list.txt: 9 of 9 labels differ from those of the training images" in refused()


def test_row_10_classes_of_both_splits_must_match(images, refused, train):
    (images / "train/.ipynb_checkpoints").mkdir()
    shutil.copy(images / "train/n01/n01_0.JPEG", images / "train/.ipynb_checkpoints/n01_0.JPEG")
    assert train().run.config["num_classes"] == 3  # a hidden folder does not shift labels
    (images / "val/n02").rename(images / "val/n02b")
    assert "val/n02b is not a class of train/" in refused()


def test_ignored_files_and_folders_are_reported(images):
    (images / "train/n01/more").mkdir()
    shutil.copy(images / "train/n01/n01_0.JPEG", images / "train/loose.JPEG")
    shutil.rmtree(images / "val/n03")
    warnings = "\n".join(open_folder(images).warnings)
    assert "train/: 1 images outside class folders are ignored, e.g. loose.JPEG" in warnings
    assert "train/: nested folders in 1 class folders are ignored, e.g. in train/n01/" in warnings
    assert "val/: 1 of 3 classes have no images, e.g. n03" in warnings


def test_list_may_have_a_byte_order_mark_and_double_slashes(images):
    write_lists(images, lambda split, lines: [line.replace("/", "//") for line in lines])
    file = images / "train_list.txt"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert open_folder(images).warnings == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("n01/n01_0.JPEG", "is not a path and a label"),
        ("n01/n01_0.JPEG one", "is not a path and a label"),
        ("n01/n01_0.JPEG -1", "is not a path and a label"),
        ("n01/n01_0.JPEG " + "9" * 5000, "is not a path and a label"),
        ("n01 0", "1 of 1 files are missing"),
        ("/etc/passwd 0", "points outside the data set"),
        ("../../secret.JPEG 0", "points outside the data set"),
        ("", "empty; remove it"),
    ],
)
def test_invalid_list_lines_are_reported(images, refused, line, expected):
    (images / "train_list.txt").write_text(f"{line}\n")
    assert expected in (message := refused())
    assert "train_list.txt" in message


def test_one_based_labels_are_refused(images, refused):
    write_lists(images, lambda split, lines: [line[:-1] + str(int(line[-1]) + 1) for line in lines])
    assert "labels range from 1 to 3 and do not include 0; labels must start at 0" in refused()


@pytest.mark.parametrize("source", ["cache", "package"])
def test_fashion_mnist_is_read_without_network(tmp_path, monkeypatch, train, source):
    """The test writes files in its format, either into the cache or compressed as in Debian's package."""
    monkeypatch.setenv("VGGLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("vgglab.data.named.PACKAGED_FASHION_MNIST", tmp_path / "package")
    raw = tmp_path / "cache" / "FashionMNIST" / "raw" if source == "cache" else tmp_path / "package"
    raw.mkdir(parents=True)
    for name, count in (("train", 40), ("t10k", 20)):
        labels = bytes(number % 10 for number in range(count))
        pixels = b"".join(bytes([25 * label] * 784) for label in labels)
        contents = {
            f"{name}-images-idx3-ubyte": struct.pack(">4i", 2051, count, 28, 28) + pixels,
            f"{name}-labels-idx1-ubyte": struct.pack(">2i", 2049, count) + labels,
        }
        for file, content in contents.items():
            if source == "cache":
                (raw / file).write_bytes(content)
            else:
                (raw / f"{file}.gz").write_bytes(gzip.compress(content))
    result = train("--image-size=32", "--epochs=1", data="fashion-mnist")
    assert result.code == 0, result.err
    assert result.run.events("eval")[0]["num_images"] == 20
    assert result.run.config["num_classes"] == 10
    sets = open_sets(parse_flags(["--data-path=fashion-mnist"]))
    assert sets.val.classes[9] == "Ankle boot"
    [first, *_] = loader.eval_batches(sets, parse_flags(["--batch-size=20", "--workers=0"]), rank()).epoch(0)
    assert first.images[:, 0, 0, 0].tolist() == [25 * (number % 10) for number in range(20)]


@pytest.mark.parametrize(("labels", "classes"), [([0, 1], ["b", "a"]), ([0, 2], ["a", "b"])])
def test_named_set_whose_labels_and_classes_disagree_is_refused(refused, monkeypatch, labels, classes):
    """A run with another order of classes in the held-out images ended with a wrong accuracy and no message."""

    def split(name, size):
        pixels = ArrayImages(torch.zeros(2, size, size, dtype=torch.uint8), name)
        return Split(pixels, labels, classes) if name == "val" else Split(pixels, [0, 1], ["a", "b"])

    monkeypatch.setitem(NAMED_SETS, "digits", NamedSet(Preprocessing(32), "", split=split))
    line = refused("--batch-size=2", "--epochs=1", data="digits")
    assert "--data-path digits: labels and classes disagree" in line


@pytest.mark.parametrize("name", [name for name in NAMED_SETS if name not in ("digits", "fake")])
def test_failed_download_explains_where_to_put_which_files(tmp_path, monkeypatch, refused, name):
    def no_network(*args, **options):
        raise urllib.error.URLError("no network here")

    monkeypatch.setenv("VGGLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("vgglab.data.named.PACKAGED_FASHION_MNIST", tmp_path / "none")
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    line = refused("--image-size=32", data=name)
    if name == "imagenette" and not hasattr(torchvision.datasets, "Imagenette"):
        assert "this version of torchvision has no Imagenette" in line
        return
    assert f"--data-path {name}: cannot be downloaded" in line
    assert str(tmp_path / "cache") in line
    assert f"put {NAMED_SETS[name].archives} into" in line
    assert NAMED_SETS[name].archives


def test_fake_images_need_no_files_and_are_marked(train):
    flags = ["--image-size=32", "--training-step-per-epoch=3", "--eval-step-per-epoch=2"]
    result = train(*flags, "--crops=trivial", data="fake")
    assert result.run.report()["warnings"][0].startswith("--crops has no effect with --data-path fake")
    report = result.run.report()
    assert (report["data_is_fake"], result.run.config["num_classes"]) == (True, 1000)
    assert result.run.events("start")[0]["num_train_images"] == 1_281_167
    assert train().run.report()["data_is_fake"] is False


def test_worker_memory_does_not_grow_and_workers_exit_with_the_process(images):
    code = (
        "import sys; from multiprocessing import active_children; from vgglab.settings.parser import parse_flags\n"
        "from vgglab.data.sets import open_sets; from vgglab.data import loader\n"
        "from vgglab.devices import open_device\n"
        "c = parse_flags([f'--data-path={sys.argv[1]}', '--batch-size=6', '--workers=1', '--seed=1', "
        "'--image-size=224'])\n"
        "b = loader.train_batches(open_sets(c), c, open_device('cpu'))\n"
        "worker_kib = lambda: [int(line.split()[1]) for child in active_children()\n"
        "                      for line in open(f'/proc/{child.pid}/status') if line.startswith('VmRSS')]\n"
        "sizes = []\n"
        "for epoch in range(40):\n"
        "    for batch in b.epoch(epoch): pass\n"
        "    sizes += worker_kib()\n"
        "print(len(sizes), max(sizes[-3:]) - max(sizes[:10]))\n"
    )
    result = python("-c", code, images)
    assert result.returncode == 0, result.stderr
    num_sizes, growth_kib = map(int, result.stdout.split())
    assert num_sizes == 40
    assert growth_kib < 12 * 1024  # one leaked page per image would be 40 MB in 40 epochs


def test_prefetch_requests_the_next_batch_before_yielding():
    from vgglab.devices.native import prefetch

    requested = []
    source = (requested.append(number) or number for number in range(4))
    received = []
    for number in prefetch(source):
        received.append((number, len(requested)))
    assert received == [(0, 2), (1, 3), (2, 4), (3, 4)]
    assert list(prefetch([])) == []
    assert list(prefetch([7])) == [7]


def test_benchmark_prints_ratios_and_a_final_json_line(images):
    args = ["-m", "vgglab.bench", "data", f"--data-path={images}", "--image-size=32", "--batch-size=6"]
    result = python(*args, "--seconds=0.2", "--workers=1", "--card=100", "--json")
    assert result.returncode == 0, result.stderr
    metrics = json.loads(result.stdout.splitlines()[-1])
    assert {"images_per_second", "reference_images_per_second", "ratio"} <= set(metrics)
    assert metrics["ratio_range"][0] <= metrics["ratio"] <= metrics["ratio_range"][1]
    assert metrics["by_workers"]["1"]["images_per_second"] > 0
    assert "100 images/s: needs" in result.stdout
    for invalid in (["--workers=²"], ["--data-path=/nowhere"], ["--data-path=fake"], ["--card=nan"], ["--no-such"]):
        result = python(*args, *invalid)
        assert (result.returncode, len(result.stderr.strip().splitlines())) == (2, 1), result.stderr
    assert python("-m", "vgglab.bench", "nothing").returncode == 2
