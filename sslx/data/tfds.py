"""TensorFlow Datasets, read at random and without TensorFlow."""

import importlib
import pathlib
from typing import Any

import numpy as np

from sslx.config import UserError
from sslx.data import BadRecord, Example, Info, Source
from sslx.data.fingerprint import fingerprint


class Records:
    """Example i is record i of a TFDS data source, with the fields that sslx knows."""

    def __init__(self, records: Any, fields: dict[str, str], name: str):
        self.records, self.fields, self.name = records, fields, name

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        try:
            record = self.records[index]
            example = {ours: np.asarray(record[theirs]) for ours, theirs in self.fields.items()}
        except Exception as error:  # what the reader and its decoders raise is not documented
            raise BadRecord(f"record {index} of {self.name}", f"cannot be read ({error})") from error
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
    try:
        builder = (tensorflow_datasets.builder_from_directory(dataset) if pathlib.Path(dataset).is_dir()
                   else tensorflow_datasets.builder(dataset, data_dir=data_dir, file_format="array_record"))
        records = builder.as_data_source(split)
    except Exception as error:  # TFDS raises its own, absl's and plain errors
        where = f", data_dir={data_dir!r}" if data_dir else ""
        raise UserError(
            f"config.data.dataset is {dataset!r}, whose split {split!r} cannot be read: {first_line(error)}. Prepare it"
            " where TensorFlow is installed, as ArrayRecord: python -c \"import tensorflow_datasets as tfds;"
            f" tfds.builder({dataset!r}{where}, file_format='array_record').download_and_prepare()\"") from error
    features = builder.info.features
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
    return Source(Records(records, fields, info.name), info)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
