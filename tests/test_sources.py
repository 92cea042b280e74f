"""Datasets in the layouts in which they are distributed, a few images each, through the sources that read them."""

import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from test_beton import jpeg, make_shard, make_tree, photo, stored

from automix_dist import beton, datasets, prepare, shards, sources
from automix_dist.beton import BetonError
from automix_dist.sources import SourceError, open_source

pytestmark = pytest.mark.filterwarnings("ignore:source ")  # no fixture has as many images as were published

PICTURES = [jpeg(photo(i, 24, 18)) for i in range(6)]


def table(*rows: str) -> bytes:
    return "".join(f"{row}\n" for row in rows).encode()


def numpy_records(rows: list[dict]) -> np.ndarray:
    """A MATLAB struct array."""
    records = np.zeros((1, len(rows)), [(name, object) for name in rows[0]])
    for i, row in enumerate(rows):
        for name, value in row.items():
            records[name][0, i] = value
    return records


def mat(**values) -> bytes:
    import scipy.io

    buffer = io.BytesIO()
    scipy.io.savemat(buffer, values)
    return buffer.getvalue()


def tiny_imagenet() -> dict[str, bytes]:
    wnids = [f"n{1000 + 7 * i:08d}" for i in range(200)]
    files = {f"train/{wnid}/images/{wnid}_0.JPEG": PICTURES[i % 6] for i, wnid in enumerate(wnids)}
    files |= {f"train/{wnid}/{wnid}_boxes.txt": b"" for wnid in wnids[:3]}
    files |= {f"val/images/val_{i}.JPEG": PICTURES[i] for i in range(3)}
    files["val/val_annotations.txt"] = table(*(f"val_{i}.JPEG\t{wnids[50 * i]}\t0\t32\t44\t62" for i in range(3)))
    files["wnids.txt"] = table(*reversed(wnids))
    files["words.txt"] = table(*(f"{wnid}\tsome, words" for wnid in wnids))
    return {f"tiny-imagenet-200/{name}": data for name, data in files.items()}


def cub200() -> dict[str, bytes]:
    names = [f"{i + 1:03d}.Bird_{i}" for i in range(200)]
    images = [f"{names[label]}/Bird_{i:04d}.jpg" for i, label in enumerate((0, 0, 7, 199))]
    files = {f"images/{name}": PICTURES[i] for i, name in enumerate(images)}
    files["classes.txt"] = table(*(f"{i + 1} {name}" for i, name in enumerate(names)))
    files["images.txt"] = table(*(f"{i + 1} {name}" for i, name in enumerate(images)))
    files["image_class_labels.txt"] = table("1 1", "2 1", "3 8", "4 200")
    files["train_test_split.txt"] = table("1 1", "2 0", "3 1", "4 0")
    return {f"CUB_200_2011/{name}": data for name, data in files.items()}


def aircraft() -> dict[str, bytes]:
    variants = ["707-320", "DC-3 of old", *(f"A{i}" for i in range(98))]
    files = {f"images/{1000 + i}.jpg": PICTURES[i] for i in range(4)}
    files["variants.txt"] = table(*variants)
    files["images_variant_trainval.txt"] = table("1000 707-320", "1001 DC-3 of old")
    files["images_variant_test.txt"] = table("1002 A97", "1003 707-320")
    return {f"fgvc-aircraft-2013b/data/{name}": data for name, data in files.items()}


def cars(first_class: int = 3) -> dict[str, bytes]:
    def annotations(*classes: int) -> bytes:
        rows = [
            {"bbox_x1": 1, "class": np.uint8(label), "fname": f"{i + 1:05d}.jpg"} for i, label in enumerate(classes)
        ]
        return mat(annotations=numpy_records(rows))

    names = np.array([f"Maker Model {i} 2012" for i in range(196)], object)[None]
    files = {f"cars_{part}/{i + 1:05d}.jpg": PICTURES[i] for part in ("train", "test") for i in range(2)}
    files["devkit/cars_meta.mat"] = mat(class_names=names)
    files["devkit/cars_train_annos.mat"] = annotations(first_class, 196)
    files["cars_test_annos_withlabels.mat"] = annotations(196, 1)
    return {f"stanford_cars/{name}": data for name, data in files.items()}


def inat(year: int, images: str, num_classes: int) -> dict[str, bytes]:
    def annotations(labels: dict[str, int]) -> bytes:
        content = {
            "images": [{"id": 10 * i, "file_name": f"{images}/{name}"} for i, name in enumerate(labels)],
            "annotations": [
                {"id": i, "image_id": 10 * i, "category_id": label}
                for i, label in reversed(list(enumerate(labels.values())))
            ],
            "categories": [
                {"id": i, "name": f"species {i}", "supercategory": "Aves"} for i in reversed(range(num_classes))
            ],
        }
        return json.dumps(content).encode()

    train, val = {"Aves/9/a.jpg": 9, "Aves/0/b.jpg": 0}, {"Aves/9/c.jpg": 9, "Fungi/x/d.jpg": num_classes - 1}
    files = {f"{images}/{name}": PICTURES[i] for i, name in enumerate([*train, *val])}
    return files | {f"train{year}.json": annotations(train), f"val{year}.json": annotations(val)}


def places205() -> dict[str, bytes]:
    folders = [f"{name[0]}/{name}" for name in ("abbey", "airport/outdoor", *(f"place_{i:03d}" for i in range(203)))]
    train = {f"{folder}/gsun_{i}.jpg": i for i, folder in enumerate(folders)}
    val = {"p/place_202/gsun_v.jpg": 204, "a/airport/outdoor/gsun_w.jpg": 1}
    images = "data/vision/torralba/deeplearning/images256"
    return {
        **{f"{images}/{name}": PICTURES[i % 6] for i, name in enumerate([*train, *val])},
        "trainvalsplit_places205/train_places205.csv": table(*(f"{name} {label}" for name, label in train.items())),
        "trainvalsplit_places205/val_places205.csv": table(*(f"{name} {label}" for name, label in val.items())),
    }


def imagenet() -> dict[str, bytes]:
    wnids = datasets.imagenet_classes()
    train = {f"train/{wnid}/{wnid}_1{i % 7}.JPEG": PICTURES[i % 6] for i, wnid in enumerate(wnids)}
    return train | {f"val/{wnid}/ILSVRC2012_val_{i:08d}.JPEG": PICTURES[i % 6] for i, wnid in enumerate(wnids)}


BUILDERS = {
    "tiny-imagenet": tiny_imagenet,
    "cub200": cub200,
    "aircraft": aircraft,
    "cars": cars,
    "inat2017": lambda: inat(2017, "train_val_images", 5089),
    "inat2018": lambda: inat(2018, "train_val2018", 8142),
    "places205": places205,
    "imagenet": imagenet,
}


@pytest.fixture(scope="module")
def trees(tmp_path_factory) -> dict[str, Path]:
    """Every dataset; tests that change one copy it."""
    root = tmp_path_factory.mktemp("datasets")
    return {kind: make_tree(root / kind, build()) for kind, build in BUILDERS.items()}


@pytest.fixture
def tree(trees, tmp_path):
    return lambda kind: Path(shutil.copytree(trees[kind], tmp_path / "tree"))


EXPECTED = {
    "tiny-imagenet": (
        200,
        [("train/n00001000/images/n00001000_0.JPEG", 0), ("train/n00001007/images/n00001007_0.JPEG", 1)],
        [("val/images/val_0.JPEG", 0), ("val/images/val_1.JPEG", 50), ("val/images/val_2.JPEG", 100)],
    ),
    "cub200": (
        2,
        [("images/001.Bird_0/Bird_0000.jpg", 0), ("images/008.Bird_7/Bird_0002.jpg", 7)],
        [("images/001.Bird_0/Bird_0001.jpg", 0), ("images/200.Bird_199/Bird_0003.jpg", 199)],
    ),
    "aircraft": (
        2,
        [("data/images/1000.jpg", 0), ("data/images/1001.jpg", 1)],
        [("data/images/1002.jpg", 99), ("data/images/1003.jpg", 0)],
    ),
    "cars": (2, [("cars_train/00001.jpg", 2), ("cars_train/00002.jpg", 195)], [("cars_test/00001.jpg", 195)]),
    "inat2017": (
        2,
        [("train_val_images/Aves/9/a.jpg", 9), ("train_val_images/Aves/0/b.jpg", 0)],
        [("train_val_images/Aves/9/c.jpg", 9), ("train_val_images/Fungi/x/d.jpg", 5088)],
    ),
    "inat2018": (
        2,
        [("train_val2018/Aves/9/a.jpg", 9), ("train_val2018/Aves/0/b.jpg", 0)],
        [("train_val2018/Aves/9/c.jpg", 9), ("train_val2018/Fungi/x/d.jpg", 8141)],
    ),
    "places205": (
        205,
        [("images256/a/abbey/gsun_0.jpg", 0), ("images256/a/airport/outdoor/gsun_1.jpg", 1)],
        [("images256/p/place_202/gsun_v.jpg", 204), ("images256/a/airport/outdoor/gsun_w.jpg", 1)],
    ),
    "imagenet": (
        1000,
        [("train/n01440764/n01440764_10.JPEG", 0), ("train/n01443537/n01443537_11.JPEG", 1)],
        [("val/n01440764/ILSVRC2012_val_00000000.JPEG", 0), ("val/n01443537/ILSVRC2012_val_00000001.JPEG", 1)],
    ),
}


@pytest.mark.parametrize("kind", BUILDERS)
def test_both_splits_are_read_with_the_same_classes(trees, kind):
    train_count, *first_images = EXPECTED[kind]
    train, val = (open_source(f"{kind}:{trees[kind]}", split) for split in ("train", "val"))
    assert train.classes == val.classes
    assert len(set(train.classes)) == len(train.classes) == train.num_classes
    assert len(train.labels) == len(train.files) == train_count
    for source, expected in zip((train, val), first_images, strict=True):
        assert source.unknown == {}
        assert source.labels.dtype == np.int64
        for i, (name, label) in enumerate(expected):
            assert source.name(i).endswith(name)
            assert source.labels[i] == label
            assert source.load(i) == Path(source.name(i)).read_bytes()


@pytest.mark.parametrize("kind", [kind for kind in BUILDERS if kind not in ("imagenet", "tiny-imagenet", "places205")])
def test_jpegs_are_stored_as_they_are(trees, kind, tmp_path):
    manifest = prepare.prepare(f"{kind}:{trees[kind]}", tmp_path / "x.beton", split="val", progress=False)
    source = open_source(f"{kind}:{trees[kind]}", "val")
    assert [stored(tmp_path / "x.beton", i) for i in range(manifest.count)] == [source.load(i) for i in range(2)]
    assert manifest.classes == source.classes
    assert beton.verify(tmp_path / "x.beton") == manifest


@pytest.mark.parametrize("split", ["train", "val"])
def test_as_torchvision_reads_them(trees, split):
    from torchvision.datasets import FGVCAircraft, ImageFolder, StanfordCars

    references = {
        "aircraft": FGVCAircraft(str(trees["aircraft"]), "trainval" if split == "train" else "test", loader=str),
        "cars": StanfordCars(str(trees["cars"]), "train" if split == "train" else "test", loader=str),
        "imagenet": ImageFolder(str(trees["imagenet"] / split), loader=str),
    }
    for kind, reference in references.items():
        source = open_source(f"{kind}:{trees[kind]}", split)
        assert source.classes == list(reference.classes)
        assert [(source.name(i), label) for i, label in enumerate(source.labels.tolist())] == [*reference]


@pytest.mark.parametrize("kind", ["tiny-imagenet", "cub200", "aircraft", "cars"])
def test_the_unpacked_folder_itself_is_taken_too(trees, kind):
    inner = trees[kind] / sources.SOURCES[kind].folder
    assert open_source(f"{kind}:{inner}", "val").files == open_source(f"{kind}:{trees[kind]}", "val").files


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("split", ["train", "val"])
def test_an_empty_folder_gives_the_layout(kind, split, tmp_path):
    with pytest.raises(SourceError) as error:
        open_source(f"{kind}:{tmp_path}", split)
    text = str(error.value)
    assert text.startswith(f"source '{kind}:{tmp_path}': {tmp_path}/")
    assert " is missing; expected\n  DIR/" in text
    assert all(line.startswith("  ") for line in text.splitlines()[1:])


NEEDED = [
    ("tiny-imagenet", "train", "tiny-imagenet-200/wnids.txt"),
    ("tiny-imagenet", "train", "tiny-imagenet-200/train"),
    ("tiny-imagenet", "train", "tiny-imagenet-200/train/n00001007/images"),
    ("tiny-imagenet", "val", "tiny-imagenet-200/val/val_annotations.txt"),
    ("tiny-imagenet", "val", "tiny-imagenet-200/val/images"),
    ("cub200", "train", "CUB_200_2011/classes.txt"),
    ("cub200", "train", "CUB_200_2011/images.txt"),
    ("cub200", "train", "CUB_200_2011/image_class_labels.txt"),
    ("cub200", "val", "CUB_200_2011/train_test_split.txt"),
    ("cub200", "val", "CUB_200_2011/images"),
    ("aircraft", "train", "fgvc-aircraft-2013b/data/variants.txt"),
    ("aircraft", "train", "fgvc-aircraft-2013b/data/images_variant_trainval.txt"),
    ("aircraft", "val", "fgvc-aircraft-2013b/data/images_variant_test.txt"),
    ("aircraft", "val", "fgvc-aircraft-2013b/data/images"),
    ("cars", "train", "stanford_cars/devkit/cars_meta.mat"),
    ("cars", "train", "stanford_cars/devkit/cars_train_annos.mat"),
    ("cars", "val", "stanford_cars/cars_test_annos_withlabels.mat"),
    ("cars", "val", "stanford_cars/cars_test"),
    ("inat2017", "val", "val2017.json"),
    ("inat2018", "train", "train_val2018"),
    ("places205", "val", "trainvalsplit_places205/train_places205.csv"),
    ("places205", "val", "trainvalsplit_places205/val_places205.csv"),
    ("places205", "train", "data/vision/torralba/deeplearning/images256"),
]


@pytest.mark.parametrize(("kind", "split", "name"), NEEDED)
def test_what_is_missing_is_named(tree, kind, split, name):
    root = tree(kind)
    (root / name).rename(root / "elsewhere")
    with pytest.raises(SourceError, match=re.escape(f"{root / name} is missing")):
        open_source(f"{kind}:{root}", split)


def test_a_dataset_in_a_folder_of_datasets_is_suggested(trees):
    with pytest.raises(SourceError, match=re.escape(f"did you mean cub200:{trees['cub200']}?")):
        open_source(f"cub200:{trees['cub200'].parent}", "train")


def test_near_misses_are_suggested(tree):
    root = tree("inat2017")
    with pytest.raises(SourceError, match=re.escape(f"did you mean inat2017:{root}?")):
        open_source(f"inat2017:{root.parent}", "train")
    with pytest.raises(SourceError, match=re.escape(f"did you mean inat2017:{root}?")):
        open_source(f"inat2017:{root}/train_val_images", "train")
    (root / "val2017.json").rename(root / "val_2017.json")
    with pytest.raises(SourceError, match=re.escape(f"did you mean {root}/val_2017.json?")):
        open_source(f"inat2017:{root}", "val")
    with pytest.raises(SourceError, match=re.escape(f"did you mean {root}?")):
        open_source(f"inat2017:{root.parent}/three", "train")
    with pytest.raises(SourceError, match=re.escape(f"did you mean {root}?")):
        open_source(f"imagefolder:{root.parent}/trees", "train")
    with pytest.raises(SourceError, match=r"aircraft:DIR.*did you mean aircraft\?"):
        open_source("aircrafts:x", "train")


LABEL_MISTAKES = {
    "tiny-imagenet": ("val", "val/val_annotations.txt", b"n00001350", b"n00001351", "class 'n00001351' is not one"),
    "cub200": ("train", "image_class_labels.txt", b"3 8", b"3 201", "class '201' is not one of the 200"),
    "aircraft": ("train", "data/images_variant_trainval.txt", b"DC-3 of old", b"DC-4", "class 'DC-4' is not one of"),
    "inat2017": ("val", "val2017.json", b'"category_id": 9}', b'"category_id": 5089}', "'category 5089' is not one"),
    "places205": ("val", "trainvalsplit_places205/val_places205.csv", b" 204", b" 205", "label 205 is not in 0 .. 204"),
}


@pytest.mark.parametrize("kind", LABEL_MISTAKES)
def test_images_with_an_unknown_class_are_listed(tree, kind, tmp_path):
    split, file, old, new, reason = LABEL_MISTAKES[kind]
    root = tree(kind)
    path = root / sources.SOURCES[kind].folder / file
    path.write_bytes(path.read_bytes().replace(old, new))
    source = open_source(f"{kind}:{root}", split)
    ((wrong, why),) = source.unknown.items()
    assert reason in why
    arguments = {"source": f"{kind}:{root}", "out": tmp_path / "x.beton", "split": split, "progress": False}
    with pytest.raises(BetonError, match="have an unknown class") as error:
        prepare.prepare(**arguments)
    assert str(error.value).splitlines()[1:] == [f"  {source.name(wrong)}: {why}"]
    manifest = prepare.prepare(options=prepare.PrepareOptions(skip_broken=True), **arguments)
    assert manifest.skipped == [source.name(wrong)]
    assert manifest.count == len(source.labels) - 1


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("number", [0, 197])
def test_cars_with_an_unknown_class(number, tmp_path):
    source = open_source(f"cars:{make_tree(tmp_path, cars(first_class=number))}", "train")
    assert list(source.unknown) == [0]
    assert source.labels.tolist() == [-1, 195]


def test_missing_images_are_listed_with_their_paths(tree, tmp_path):
    root = tree("cub200")
    missing = root / "CUB_200_2011/images/008.Bird_7/Bird_0002.jpg"
    missing.unlink()
    with pytest.raises(BetonError, match=rf"1 of 2 images.*\n  {missing}: FileNotFoundError"):
        prepare.prepare(f"cub200:{root}", tmp_path / "x.beton", progress=False)


WRONG_CONTENT = [
    ("cub200", "CUB_200_2011/classes.txt", b"1 001.Albatross\n", "1 classes found where the dataset has 200"),
    ("cub200", "CUB_200_2011/images.txt", b"1\n", r"line 1 is '1': expected 2 values"),
    ("cub200", "CUB_200_2011/images.txt", b"\xff\xfe\n", "is not a text file"),
    ("cub200", "CUB_200_2011/train_test_split.txt", b"1 1\n2 0\n3 1\n", "differ in image 4"),
    ("cub200", "CUB_200_2011/train_test_split.txt", b"1 0\n2 0\n3 0\n4 0\n", "no images for train"),
    ("aircraft", "fgvc-aircraft-2013b/data/variants.txt", b"", "0 classes found"),
    ("cars", "stanford_cars/devkit/cars_train_annos.mat", b"", "cannot be read"),
    ("cars", "stanford_cars/devkit/cars_meta.mat", b"nonsense" * 100, "cannot be read"),
    ("inat2018", "train2018.json", b'{"images": []', "is not an annotation file"),
    ("inat2018", "train2018.json", b"[]", "is not an annotation file"),
    ("places205", "trainvalsplit_places205/train_places205.csv", b"a/abbey/1.jpg 0\n", "1 classes found"),
    ("tiny-imagenet", "tiny-imagenet-200/train/extra/images/1.JPEG", b"", "has 1 folders that are no classes.*extra"),
]


@pytest.mark.parametrize(("kind", "name", "data", "message"), WRONG_CONTENT)
def test_wrong_content_is_an_error(tree, kind, name, data, message):
    root = make_tree(tree(kind), {name: data})
    with pytest.raises(SourceError, match=message):
        open_source(f"{kind}:{root}", "train")


def test_another_number_of_images_is_a_warning(trees, tmp_path):
    with pytest.warns(UserWarning, match="2 train images where 5,994 were published"):
        prepare.prepare(f"cub200:{trees['cub200']}", tmp_path / "x.beton", progress=False)


def test_imagenet_classes_are_those_of_the_challenge():
    from timm.data import ImageNetInfo

    assert datasets.imagenet_classes() == sorted(ImageNetInfo("imagenet-1k").label_names())


def test_imagenet_with_wrong_class_folders(tree):
    root = tree("imagenet")
    with pytest.raises(SourceError, match=re.escape(f"did you mean imagenet:{root}?")):
        open_source(f"imagenet:{root / 'train'}", "train")
    (root / "train/n01440764").rename(root / "n01440764")
    with pytest.raises(SourceError, match=rf"'n01440764'; for a subset of the classes use imagefolder:{root};"):
        open_source(f"imagenet:{root}", "train")
    (root / "n01440764").rename(root / "train/n99999999")
    (root / "val/n15075141").rename(root / "val/tench")
    with pytest.raises(
        SourceError,
        match=r"train lacks 1 of 1000 class folders: 'n01440764' and has 1 folders that are no .*: 'n99999999'",
    ):
        open_source(f"imagenet:{root}", "train")
    with pytest.raises(SourceError, match=r"val lacks 1 of 1000 class folders: 'n15075141' and has 1 .*: 'tench'"):
        open_source(f"imagenet:{root}", "val")
    shutil.rmtree(root / "train")
    make_tree(root, {f"train/{wnid}.tar": b"" for wnid in datasets.imagenet_classes()})
    with pytest.raises(SourceError, match=r"lacks 1000 of 1000.*and 980 more; 1000 of the \.tar files in it are not"):
        open_source(f"imagenet:{root}", "train")


def test_imagenet_says_which_counts_differ(tree):
    root = tree("imagenet")
    for i in range(49):
        (root / f"val/n01440764/more_{i}.JPEG").write_bytes(PICTURES[0])
    (root / "val/n01443537/ILSVRC2012_val_00000001.JPEG").unlink()
    some, total = open_source(f"imagenet:{root}", "val").remarks
    assert some.startswith("999 classes do not have 50 images: 'n01443537 has 0', 'n01484850 has 1', ")
    assert total == "1,048 val images where 50,000 were published"
    some, total = open_source(f"imagenet:{root}", "train").remarks
    assert some.startswith("1000 classes do not have 732 to 1300 images: 'n01440764 has 1'")


TRUTH = {1: "n01443537", 2: "n15075141", 3: "n01440764"}


def devkit() -> dict[str, bytes]:
    """The development kit's two files: its numbers follow another order than the WordNet ids, inner nodes come last."""
    wnids = [*reversed(datasets.imagenet_classes()), "n00001740"]
    rows = [
        {"ILSVRC2012_ID": i + 1, "WNID": wnid, "words": "a, b", "gloss": "c", "num_children": int(i >= 1000)}
        for i, wnid in enumerate(wnids)
    ]
    return {
        "data/meta.mat": mat(synsets=numpy_records(rows).T),
        "data/ILSVRC2012_validation_ground_truth.txt": table(*(str(wnids.index(w) + 1) for w in TRUTH.values())),
    }


def flat_val(root: Path, place: str = "val") -> Path:
    return make_tree(root, {f"{place}/ILSVRC2012_val_{i:08d}.JPEG": PICTURES[i] for i in TRUTH})


def check_flat_val(root: Path) -> None:
    source = open_source(f"imagenet:{root}", "val")
    assert source.classes == datasets.imagenet_classes()
    assert [Path(source.name(i)).stem[-1] for i in range(3)] == ["1", "2", "3"]
    assert [source.classes[label] for label in source.labels] == list(TRUTH.values())


@pytest.mark.parametrize("how", ["archive", "unpacked"])
def test_flat_imagenet_val_with_the_development_kit(tmp_path, how, monkeypatch):
    flat_val(tmp_path)
    with pytest.raises(SourceError, match="nothing says which image has which class"):
        open_source(f"imagenet:{tmp_path}", "val")
    if how == "unpacked":
        make_tree(tmp_path / "ILSVRC2012_devkit_t12", devkit())
    else:
        with tarfile.open(tmp_path / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
            for name, data in devkit().items():
                info = tarfile.TarInfo(f"ILSVRC2012_devkit_t12/{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        import torch
        from torchvision.datasets import imagenet as torchvision_imagenet

        monkeypatch.setattr(torchvision_imagenet, "_verify_archive", lambda root, file, md5: None)
        torchvision_imagenet.parse_devkit_archive(tmp_path)
        assert torch.load(tmp_path / "meta.bin")[1] == list(TRUTH.values())
    check_flat_val(tmp_path)


@pytest.mark.parametrize("place", ["val", "ILSVRC/Data/CLS-LOC/val"])
def test_flat_imagenet_val_with_kaggles_table(tmp_path, place):
    flat_val(tmp_path, place)
    rows = [f"ILSVRC2012_val_{i:08d},{wnid} 85 1 499 272 {wnid} 1 2 3 4" for i, wnid in reversed(TRUTH.items())]
    for mark in (b"", b"\xef\xbb\xbf"):  # of UTF-8, as some editors write it
        (tmp_path / "LOC_val_solution.csv").write_bytes(mark + table("ImageId,PredictionString", *rows))
        check_flat_val(tmp_path)
    (tmp_path / place / "ILSVRC2012_val_00000001.JPEG").rename(tmp_path / place / "ILSVRC2012_val_00000009.JPEG")
    source = open_source(f"imagenet:{tmp_path}", "val")
    assert source.unknown == {2: "class 'unknown' is not one of the 1000 classes"}
    assert source.remarks[0] == f"1 images are missing in {tmp_path / place}: 'ILSVRC2012_val_00000001'"


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("LOC_val_solution.csv", b"a,b\n1,2\n"),
        ("ILSVRC2012_devkit_t12.tar.gz", b"nonsense"),
        ("ILSVRC2012_devkit_t12/data/meta.mat", b""),
    ],
)
def test_a_damaged_ground_truth_is_named(tmp_path, name, data):
    flat_val(tmp_path)
    make_tree(tmp_path, {"ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": b"1\n", name: data})
    with pytest.raises(SourceError, match=r"(LOC_val|ILSVRC2012_devkit).* cannot be read"):
        open_source(f"imagenet:{tmp_path}", "val")


def parquet_shard(
    path: Path, images: list, labels: list, names: list[str] | None = None, *, group=2, **columns
) -> None:
    """A shard as Hugging Face's `datasets` writes it; with `names`, label numbers are a ClassLabel."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"image": images, "label": labels} | columns
    arrays = pa.table(columns)
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        arrays = arrays.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(arrays, path, row_group_size=group)


def structs(pictures: list[bytes]) -> list[dict]:
    return [{"bytes": data, "path": f"{i}.jpg"} for i, data in enumerate(pictures)]


@pytest.fixture
def hugging_face(tmp_path) -> Path:
    """A repository as downloaded: train in two shards, validation in one, test without labels."""
    names, root = ["cat", "dog", "cow"], tmp_path / "repository"
    parquet_shard(root / "data/train-00000-of-00002.parquet", structs(PICTURES[:3]), [2, 0, 1], names)
    parquet_shard(root / "data/train-00001-of-00002.parquet", structs(PICTURES[3:5]), [0, 0], names)
    parquet_shard(root / "data/validation-00000-of-00001.parquet", structs(PICTURES[5:]), [1], names)
    parquet_shard(root / "data/test-00000-of-00001.parquet", structs(PICTURES[:1]), [-1], names)
    return root


def test_parquet_of_hugging_face(hugging_face, tmp_path):
    train, val = (open_source(f"parquet:{hugging_face}", split) for split in ("train", "val"))
    assert train.classes == val.classes == ["cat", "dog", "cow"]
    assert (train.labels.tolist(), val.labels.tolist()) == ([2, 0, 1, 0, 0], [1])
    assert [train.load(i) for i in (4, 0, 3, 1, 2)] == [PICTURES[i] for i in (4, 0, 3, 1, 2)]
    assert train.name(3) == f"{hugging_face}/data/train-00001-of-00002.parquet: row 0"
    sums = set()
    for workers in (1, 4):
        manifest = prepare.prepare(f"parquet:{hugging_face}", tmp_path / "x.beton", workers=workers, progress=False)
        sums.add(manifest.checksum)
        assert [stored(tmp_path / "x.beton", i) for i in range(5)] == PICTURES[:5]
    assert len(sums) == 1
    pattern = open_source(f"parquet:{hugging_face}/**/train-00001*.parquet", "val")
    assert pattern.labels.tolist() == [0, 0]


def test_a_missing_shard_is_named(hugging_face):
    (hugging_face / "data/train-00000-of-00002.parquet").unlink()
    with pytest.raises(SourceError, match=r"1 shards are missing: '.*/data/train-00000-of-00002'; download"):
        open_source(f"parquet:{hugging_face}", "train")
    (remark,) = open_source(f"parquet:{hugging_face}/data/train-*", "train").remarks
    assert remark == f"the pattern leaves out 1 shards: '{hugging_face}/data/train-00000-of-00002'"
    hashed = [f"a/train-{i:05d}-of-00011-0123456789abcdef.parquet" for i in (*range(9), 10)]
    assert shards.missing_shards(hashed) == ["a/train-00009-of-00011"]
    assert shards.missing_shards(["x-1-of-2.tar", "x-2-of-2.tar", "y-0-of-1.tar", "z-3-of-4/y.tar"]) == []


def test_a_class_name_that_stands_for_two_classes(tmp_path):
    cranes = ["crane", "crane", "dog"]
    parquet_shard(tmp_path / "a.parquet", structs(PICTURES[:3]), [0, 1, 2], cranes)
    assert open_source(f"parquet:{tmp_path}", "train", cranes).labels.tolist() == [0, 1, 2]
    for classes, which in ((["crane", "dog"], "its own class list"), ([*cranes, "cat"], "the class list given")):
        with pytest.raises(SourceError, match=rf"{which} has 'crane' more than once"):
            open_source(f"parquet:{tmp_path}", "train", classes)


def test_class_numbers_that_no_image_has_are_told(tmp_path):
    parquet_shard(tmp_path / "a/a.parquet", PICTURES[:3], [1, 2, 4])
    (remark,) = open_source(f"parquet:{tmp_path}/a", "train").remarks
    assert remark == "of 5 class numbers these have no images: '0', '3'"
    assert open_source(f"parquet:{tmp_path}/a", "train", [*"01234"]).remarks == []
    make_shard(tmp_path / "s.tar", {"1.jpg": PICTURES[0], "1.cls": b"1"})
    assert open_source(f"webdataset:{tmp_path}", "train").remarks == ["of 2 class numbers these have no images: '0'"]


def test_parquet_reads_each_row_group_once(tmp_path, monkeypatch):
    images = structs([PICTURES[i % 6] for i in range(60)])
    parquet_shard(tmp_path / "a.parquet", images, [0] * 60, group=10)
    source = open_source(f"parquet:{tmp_path}", "train")
    reads, whole = [], source._parquet.ParquetFile.read_row_group
    monkeypatch.setattr(
        source._parquet.ParquetFile,
        "read_row_group",
        lambda self, group, **options: (reads.append(group), whole(self, group, **options))[1],
    )
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.load, range(60))) == [image["bytes"] for image in images]
    assert reads == sorted(set(reads)) == list(range(6))
    monkeypatch.setattr(shards, "ROWS_IN_MEMORY", 1)
    for i in (0, 59, 0):
        source.load(i)
    assert len(source._loaded) == 2


@pytest.mark.parametrize(
    ("train", "val", "classes", "expected"),
    [
        ([0, 4], [1], ["0", "1", "2", "3", "4"], [1]),
        (["dog", "cat"], ["dog"], ["cat", "dog"], [1]),
    ],
)
def test_parquet_classes_without_names_are_those_of_all_splits(tmp_path, train, val, classes, expected):
    parquet_shard(tmp_path / "a/train/0000.parquet", PICTURES[:2], train)
    parquet_shard(tmp_path / "a/test/0000.parquet", PICTURES[2:3], val)
    source = open_source(f"parquet:{tmp_path}", "val")
    assert (source.classes, source.labels.tolist(), source.load(0)) == (classes, expected, PICTURES[2])
    assert open_source(f"parquet:{tmp_path}", "train").classes == classes


def test_parquet_columns_are_found(tmp_path):
    parquet_shard(
        tmp_path / "a.parquet",
        structs(PICTURES[:2]),
        [0, 1],
        ["a", "b"],
        id=[7, 8],
        thumbnail=[b"x", b"y"],
        text=["", ""],
    )
    assert open_source(f"parquet:{tmp_path}", "train").load(1) == PICTURES[1]
    parquet_shard(tmp_path / "a.parquet", ["a.jpg"], [0])
    with pytest.raises(SourceError, match=r"which column holds the images; there are: image \(string\), label"):
        open_source(f"parquet:{tmp_path}", "train")
    parquet_shard(tmp_path / "a.parquet", PICTURES[:1], [0.5])
    with pytest.raises(SourceError, match="which column holds the labels"):
        open_source(f"parquet:{tmp_path}", "train")


def test_parquet_that_cannot_be_used(hugging_face, tmp_path, monkeypatch):
    with pytest.raises(SourceError, match=re.escape(f"did you mean {hugging_face}?")):
        open_source(f"parquet:{tmp_path}/repositori", "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"no \.parquet files in that folder; expected\n  \*\.parquet"):
        open_source(f"parquet:{tmp_path / 'empty'}", "train")
    shard = hugging_face / "data/train-00001-of-00002.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match=r"train-00001-of-00002\.parquet is not a readable Parquet file"):
        open_source(f"parquet:{hugging_face}", "train")
    parquet_shard(shard, structs(PICTURES[3:5]), [0, 0], ["dog", "cat", "cow"])
    with pytest.raises(SourceError, match="has other columns or classes than"):
        open_source(f"parquet:{hugging_face}", "train")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(SourceError, match="pip install pyarrow"):
        open_source(f"parquet:{hugging_face}", "train")


def test_parquet_rows_that_cannot_be_used_are_listed(tmp_path):
    images = [*structs(PICTURES[:3]), {"bytes": None, "path": "3.jpg"}, {"bytes": b"<html>", "path": "4.jpg"}]
    parquet_shard(tmp_path / "a.parquet", images, [0, 7, None, 1, 1], ["a", "b"])
    with pytest.raises(BetonError) as error:
        prepare.prepare(f"parquet:{tmp_path}", tmp_path / "x.beton", progress=False)
    lines = str(error.value).splitlines()
    assert lines[0].startswith("4 of 5 images cannot be read or have an unknown class")
    reasons = ("1: label 7 is not in 0 .. 1", "2: label -1", "3: ValueError: the table", "4: no known image format")
    for line, expected in zip(lines[1:], reasons, strict=True):
        assert line.startswith(f"  {tmp_path}/a.parquet: row {expected}")


def test_shards_whose_split_cannot_be_told(tmp_path):
    parquet_shard(tmp_path / "x-train-0.parquet", PICTURES[:1], [0])
    with pytest.raises(SourceError, match=r"belong to val: there are .*x-train-0.parquet \(train\); give a pattern"):
        open_source(f"parquet:{tmp_path}", "val")
    parquet_shard(tmp_path / "more.parquet", PICTURES[:1], [0])
    with pytest.raises(SourceError, match=r"belong to train: .*more.parquet \(no split in its name\)"):
        open_source(f"parquet:{tmp_path}", "train")


def test_webdataset_folder_with_both_splits(tmp_path):
    for i, name in enumerate(("imagenet-train-000", "imagenet-train-001", "imagenet-val-000")):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for key, data in (("1.jpg", PICTURES[i]), ("1.cls", b"3")):
                info = tarfile.TarInfo(key)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    train, val = (open_source(f"webdataset:{tmp_path}", split) for split in ("train", "val"))
    assert [train.load(i) for i in range(2)] == PICTURES[:2]
    assert [val.load(0)] == PICTURES[2:3]
    assert train.classes == val.classes == ["0", "1", "2", "3"]


def samples(*keys: str) -> dict[str, bytes]:
    return {f"{key}.{kind}": data for key in keys for kind, data in (("jpg", PICTURES[0]), ("cls", b"0"))}


def test_a_shard_that_is_not_read_to_its_end_is_refused(tmp_path):
    a, b, shard = tmp_path / "a.tar", tmp_path / "b.tar", tmp_path / "s.tar"
    make_shard(a, samples("1", "2"))
    make_shard(b, samples("3"))
    whole = a.read_bytes()
    with tarfile.open(a) as tar:
        header = tar.getmember("2.jpg").offset
        end = tar.getmember("2.cls").offset_data + 512
    assert not any(whole[end:]) and len(whole) >= end + 1024
    second = len(whole) + next(i for i, byte in enumerate(b.read_bytes()) if byte)
    flipped = bytearray(whole)
    flipped[header + 100] ^= 0xFF
    for data, message in (
        (whole[:header], f"cut off or damaged at byte {header}"),
        (whole[: header + 300], f"cut off or damaged at byte {header}"),
        (whole[: header + 600], "unexpected end of data"),
        (bytes(flipped), f"cut off or damaged at byte {header}"),
        (whole[:end], f"cut off or damaged at byte {end}"),
        (whole + b.read_bytes(), f"ends at byte {end}, but goes on at byte {second}: .*join them with tar -A"),
    ):
        shard.write_bytes(data)
        with pytest.raises(SourceError, match=rf"s\.tar.* {message}"):
            open_source(f"webdataset:{shard}", "train")
    shard.write_bytes(whole)
    subprocess.run(["tar", "--concatenate", f"--file={shard}", b], check=True)
    assert len(open_source(f"webdataset:{shard}", "train").labels) == 3


def test_a_sample_that_is_there_twice_is_named(tmp_path):
    shard = tmp_path / "s.tar"
    with tarfile.open(shard, "w") as tar:
        for name, data in 2 * [*samples("a/1").items()]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with pytest.raises(SourceError, match=r"s\.tar has sample 'a/1' twice, the second time as 'a/1\.jpg'"):
        open_source(f"webdataset:{shard}", "train")
    make_shard(shard, samples("1") | {"1.png": PICTURES[0]})
    with pytest.raises(SourceError, match=r"sample '/1' twice, the second time as '1\.png'"):
        open_source(f"webdataset:{shard}", "train")


def test_an_image_whose_name_has_more_dots_is_not_lost(tmp_path):
    make_shard(tmp_path / "s.tar", samples("1", "3.v2"))
    with pytest.raises(SourceError, match=r"s\.tar: '3\.v2\.jpg' is no image of a sample.*first dot; rename it"):
        open_source(f"webdataset:{tmp_path}", "train")
    make_shard(tmp_path / "s.tar", samples("1") | {"1.mask.png": PICTURES[1], "._1.jpg": b"macOS"})
    assert open_source(f"webdataset:{tmp_path}", "train").load(0) == PICTURES[0]


@pytest.mark.parametrize(
    "pattern", ["s-{0008..0011}.tar", "{a,b}/s-{08..11}.tar", "{0..3}", "{3..1}{x,}", "{a,{b,c}}", "{x}", "{}", "plain"]
)
def test_braces_are_expanded_as_a_shell_does(pattern):
    shells = subprocess.run(["bash", "-c", f"echo {pattern}"], capture_output=True, text=True, check=True).stdout
    assert {*shards.expand_braces(pattern)} == {*shells.split()}


def test_shards_by_braces_and_names_with_brackets(tmp_path, monkeypatch):
    for i in (8, 9, 10):
        make_shard(tmp_path / f"s-{i:02d}.tar", samples(str(i)))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(open_source("webdataset:~/s-{08..10}.tar", "train").labels) == 3
    with pytest.raises(SourceError, match=r"2 of 5 files are missing: '.*/s-07\.tar', '.*/s-11\.tar'"):
        open_source("webdataset:~/s-{07..11}.tar", "train")
    for name in ("s[1].tar", "s{1,2}.tar"):
        make_shard(tmp_path / name, samples("1", "2"))
        assert len(open_source(f"webdataset:{tmp_path}/{name}", "train").labels) == 2


def test_folders_are_followed_through_links_once(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    make_shard(tmp_path / "elsewhere/s-1.tar", samples("1"))
    root = make_tree(tmp_path / "root", {"a/1.jpg": PICTURES[0], "a/deep/2.jpg": PICTURES[1], "b/3.jpg": PICTURES[2]})
    (root / "part").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(root)
    assert open_source(f"webdataset:{root}", "train").name(0) == f"{root}/part/s-1.tar:1.jpg"
    (root / "part").unlink()
    (root / "a/self").symlink_to(".")
    (root / "b/more").symlink_to(root / "a/deep")
    files = open_source(str(root), "train").files
    assert files == [f"{root}/{name}" for name in ("a/1.jpg", "a/deep/2.jpg", "b/3.jpg", "b/more/2.jpg")]


def test_a_link_that_makes_a_class_of_another_one_is_refused(tmp_path):
    root = make_tree(tmp_path / "root", {"cat/1.jpg": PICTURES[0], "dog/2.jpg": PICTURES[1]})
    (root / "cat/link").symlink_to("..")
    with pytest.raises(SourceError, match=r"all of .*/dog images of cat: .*/cat/link/dog; remove it"):
        open_source(str(root), "train")


def test_images_beside_the_classes_are_told(tmp_path):
    root = make_tree(tmp_path / "root", {"cat/1.jpg": PICTURES[0], "2.JPG": PICTURES[1], "3.jpg": PICTURES[2]})
    source = open_source(str(root), "train")
    assert source.files == [f"{root}/cat/1.jpg"]
    assert any("2 images beside the class folders are left out: '2.JPG', '3.jpg'" in each for each in source.remarks)


def test_hidden_images_are_told(tmp_path):
    tree = {"cat/1.jpg": PICTURES[0], "cat/.2.jpg": PICTURES[1], "cat/.ipynb_checkpoints/3.jpg": PICTURES[2]}
    source = open_source(str(make_tree(tmp_path / ".root", tree)), "train")
    assert len(source.files) == 3
    assert any(remark.startswith("2 images are hidden") for remark in source.remarks)


def test_a_shard_under_two_names_is_refused(hugging_face):
    """A Hugging Face cache has a link to the same file in each snapshot."""
    folder = next(hugging_face.rglob("*.parquet")).parent
    copy = hugging_face / "another_snapshot"
    copy.mkdir()
    for file in folder.glob("*.parquet"):
        (copy / file.name).symlink_to(file)
    with pytest.raises(SourceError, match=r"another_snapshot/.* and .* are one file"):
        open_source(f"parquet:{hugging_face}", "train")


def test_a_further_source_needs_its_class_only(monkeypatch):
    monkeypatch.setattr(sources, "SOURCES", sources.SOURCES.copy())

    class Bytes(sources.Source, usage="bytes:TEXT"):
        def __init__(self, argument, split):
            super().__init__(argument, split)
            self.label([split], [0])

        def load(self, i):
            return self.argument.encode()

        def name(self, i):
            return str(i)

    assert open_source("bytes:abc", "val").load(0) == b"abc"
    for wrong in ("nothing", ""):
        with pytest.raises(SourceError, match="bytes:TEXT"):
            open_source(wrong, "train")


def test_import_is_light():
    heavy = "{'torch', 'torchvision', 'scipy', 'sklearn', 'pyarrow'}"
    code = f"import sys, automix_dist.shards, automix_dist.datasets; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_source_is_documented():
    text = (Path(__file__).parent.parent / "docs" / "data.md").read_text()
    for kind, source in sources.SOURCES.items():
        assert f"`{source.usage}`" in text, kind
