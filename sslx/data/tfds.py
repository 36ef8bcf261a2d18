"""TensorFlow Datasets, read at random and without TensorFlow."""

import importlib
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from sslx.config import UserError
from sslx.data import BadRecord, Example, Info, Source, header
from sslx.data.fingerprint import fingerprint
from sslx.data.pixels import opened

OWN_CLASSES = "tensorflow_datasets."
CLASS_KEYS = ("pythonClassName", "python_class_name", "type")


class Records:
    """Example i is record i of a TFDS data source, with the fields that sslx knows."""

    def __init__(self, records: Any, fields: dict[str, str], shape: tuple[int, ...], num_classes: int | None,
                 name: str):
        self.records, self.fields, self.name = records, fields, name
        self.shape, self.num_classes = shape, num_classes

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        name = f"record {index} of {self.name}"
        try:
            record = self.records[index]
            example = {ours: record[theirs] for ours, theirs in self.fields.items()}
        except Exception as error:  # what the reader and its decoders raise is not documented
            raise BadRecord(name, f"cannot be read ({error})") from error
        if isinstance(example["image"], bytes):
            with opened(example["image"], name) as image:
                pixels = np.asarray(image)
            example["image"] = pixels[..., None] if pixels.ndim == 2 else pixels
        example = {field: np.asarray(x) for field, x in example.items()}
        if example["image"].shape != self.shape:
            raise BadRecord(name, f"its image has the shape {example['image'].shape}, not {self.shape}")
        if self.num_classes and "label" in example and not 0 <= example["label"] < self.num_classes:
            raise BadRecord(name, f"its label is {example['label']}, of {self.num_classes} classes")
        return example


def make(*, dataset: str, split: str = "train", data_dir: str | None = None, image: str = "image",
         label: str | None = "label") -> Source:
    """Images of equal shape, image uint8[H, W, C] and label int32, of a data set that TFDS prepared.

    `dataset` is a TFDS name such as "mnist" (prepared under `data_dir`), or a builder's folder. Its files
    must be ArrayRecord. `image` and `label` name its features. Raises UserError with the command to run.
    """
    try:
        tensorflow_datasets = importlib.import_module("tensorflow_datasets")
    except ImportError as error:
        raise UserError(f"the data source tfds needs two packages ({error}):"
                        " pip install tensorflow-datasets importlib_resources") from error
    root = pathlib.Path(data_dir or tensorflow_datasets.core.constants.DATA_DIR).expanduser()
    refuse_foreign_classes(pathlib.Path(dataset) if os.path.isdir(dataset) else root / re.split("[:/]", dataset)[0])
    try:
        builder = (tensorflow_datasets.builder_from_directory(dataset) if pathlib.Path(dataset).is_dir()
                   else tensorflow_datasets.builder(dataset, data_dir=data_dir, file_format="array_record"))
        features = builder.info.features
        # TFDS would decode whatever an image says it is, of any size.
        encoded = image in features and isinstance(features[image], tensorflow_datasets.features.Image)
        skip = {image: tensorflow_datasets.decode.SkipDecoding()} if encoded else None
        records = builder.as_data_source(split, decoders=skip)
    except Exception as error:  # TFDS raises its own, absl's and plain errors
        where = f", data_dir={data_dir!r}" if data_dir else ""
        raise UserError(
            f"config.data.dataset is {dataset!r}, whose split {split!r} cannot be read: {first_line(error)}. Prepare it"
            " where TensorFlow is installed, as ArrayRecord: python -c \"import tensorflow_datasets as tfds;"
            f" tfds.builder({dataset!r}{where}, file_format='array_record').download_and_prepare()\"") from error
    fields = {"image": image} | ({"label": label} if label else {})
    for ours, theirs in fields.items():
        if theirs not in features:
            raise UserError(f"config.data.{ours} is {theirs!r}; {dataset} has the features {', '.join(features)}")
    shape = features[image].shape
    if len(shape) != 3 or None in shape:
        raise UserError(f"the feature {image!r} of {dataset} has the shape {shape}; a batch takes images of one shape"
                        " [H, W, C]: resize them into ArrayRecord files (sslx.data.arrayrecord.write)")
    checksum = [(s.name, s.num_examples, s.num_bytes) for s in builder.info.splits.values()]
    info = Info(name=f"tfds:{builder.info.full_name}/{split}", modality="image", shape=shape,
                num_classes=getattr(features[label], "num_classes", None) if label else None,
                fingerprint=fingerprint(builder.info.full_name, split, checksum, fields))
    return Source(Records(records, fields, shape, info.num_classes, info.name), info)


def refuse_foreign_classes(home: pathlib.Path) -> None:
    """Raises UserError if a features.json under `home` names a class that TFDS would import from elsewhere."""
    for file in home.rglob("features.json"):
        for name in class_names(header.mapping(file)):
            if "." in name and not name.startswith(OWN_CLASSES):
                raise UserError(f"{file} names the class {name!r}, for which TFDS would run code that is not its own."
                                " sslx reads data sets of TFDS's own features")


def class_names(value: Any) -> Iterator[str]:
    match value:
        case dict():
            yield from (str(value[key]) for key in CLASS_KEYS if value.get(key))
            for inner in value.values():
                yield from class_names(inner)
        case list():
            for inner in value:
                yield from class_names(inner)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
