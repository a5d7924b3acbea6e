"""Patch features of the frozen encoder, kept on disk: later epochs and later runs decode no image and run no encoder.

    cache = FeatureCache("cache", model, records)              # a dataset in the place of `records`; pretrain.py, sft.py --cache-features
    batch = cache.collate([cache[i] for i in indices], pad_id)             # features of images that are there, pixels of the others
    sums = model(cache.complete(model, batch))                             # encodes the others, and keeps what it encodes

Z of an image depends on the encoder's weights and settings, on which hidden state is taken, on the transform of the image (size,
geometry, mean and deviation, filter), on the dtype and on the image. The first four and the list of images make a key; its hash names the
files, so that other features are never found under the name. The image's own size and time of change are noted beside its row, so that
an image that is replaced costs one row. Three files in the folder:

    NAME-HASH.json       the key, for people to read; written last, when the other two are there
    NAME-HASH.features   (images, P_v, D_v) in the dtype in which the encoder computes; a sparse file, filled as images come up
    NAME-HASH.rows       an ENTRY per image: what the image file was, its picture's size, and a checksum of the row

A row is written before its entry, and read only where the checksum of both is right: half a row is never read, whoever was stopped
in mid-write or writes at the same time; it is encoded again. Everything goes through plain reads and writes: a full disk is an error
that can be said, which to a memory map it is not.

reads and writes: the folder
"""
import hashlib
import json
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch

import data
import runtime
from data import InputError

ENTRY = np.dtype([("bytes", "<i8"), ("changed", "<i8"), ("width", "<i4"), ("height", "<i4"), ("checksum", "<u4")])   # all 0: nothing there


class FeatureCache(torch.utils.data.Dataset):
    """Records as samples with "features" (P_v, D_v), where the folder has them, in place of pixel_values. One row per image, however many
    records show it; several processes may read and write. InputError: not enough space for what is missing."""

    def __init__(self, folder, model, records: data.Records):
        images = [record.get("image") for record in records.records]
        names = sorted({image for image in images if image is not None})
        numbers = {name: i for i, name in enumerate(names)}
        self.records, self.folder = records, Path(folder)
        self.rows = [numbers.get(image) for image in images]                                         # of each record, None without an image
        stats = [os.stat(Path(records.image_dir) / name) for name in names]
        self.stamps = np.array([(s.st_size, s.st_mtime_ns) for s in stats], np.int64).reshape(-1, 2)
        self.shape = model.encoder_patches, model.encoder.config.hidden_size                         # P_v, D_v
        self.dtype = next(model.encoder.parameters()).dtype
        self.row_bytes = self.shape[0] * self.shape[1] * self.dtype.itemsize

        self.key = dict(
            encoder=model.config["vision"], weights=fingerprint(model.encoder), feature_layer=model.config["feature_layer"],
            dtype=str(self.dtype), patches=self.shape[0], width=self.shape[1], image_form=records.image_form, images=len(names),
            image_dir=str(Path(records.image_dir or "").resolve()), names=hashlib.sha256("\n".join(names).encode()).hexdigest())
        self.key = json.loads(json.dumps(self.key))                                                  # as it is read back: lists, no tuples
        code = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:16]
        self.path = self.folder / f"{Path(model.config['vision']).name}-{code}.features"
        self.entries = self.path.with_suffix(".rows")
        self.pending, self.asked, self.found, self.warned = None, 0, 0, False
        self.open()

    # ---- the files

    def open(self) -> None:
        """Make the files if they are not there or not whole, and say what is in them."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            damage = self.damage()
            here = 0 if damage else self.filled()
            need, free = (len(self.stamps) - here) * self.row_bytes, shutil.disk_usage(self.folder).free
            size = f"{len(self.stamps):,} images x {self.shape[0]} x {self.shape[1]} in {str(self.dtype).removeprefix('torch.')}"
            if need > free:
                raise InputError(f"--cache-features {self.folder}: {size} take {need / 1e9:,.3f} GB more, but {free / 1e9:,.3f} GB are"
                                 " free; name a folder on another disk, or leave it out")
            runtime.barrier()                                                                        # every process has looked
            if damage and int(os.environ.get("LOCAL_RANK", 0)) == 0:                                 # the folder may be one per machine
                if damage != "new":
                    runtime.log(f"{self.path}: {damage}, so it is made anew")
                for path, length in self.lengths():
                    with runtime.atomic(path) as temporary:
                        os.truncate(temporary, length)
                with runtime.atomic(self.path.with_suffix(".json")) as temporary:
                    temporary.write_text(json.dumps(self.key, indent=1))
            runtime.barrier()
        except OSError as error:
            raise InputError(f"--cache-features {error.filename or self.folder}: {error.strerror}") from None
        runtime.log(f"features: {here:,} of {size} are in {self.path}, {need / 1e9:,.3f} GB to come, {free / 1e9:,.1f} GB free")

    def lengths(self) -> list[tuple[Path, int]]:
        """The two files and the bytes that each has."""
        return [(self.path, len(self.stamps) * self.row_bytes), (self.entries, len(self.stamps) * ENTRY.itemsize)]

    def damage(self) -> str:
        """What is wrong with the files: "" nothing, "new" if they were never finished."""
        key = self.path.with_suffix(".json")
        if not key.exists():
            return "new"
        try:
            written = json.loads(key.read_text())
        except ValueError:
            written = None
        if written != self.key:
            return f"{key.name} is not the key that its name stands for"
        for path, length in self.lengths():
            found = path.stat().st_size if path.exists() else 0
            if found != length:
                return f"{path.name} is damaged ({found} bytes in place of {length})"
        return ""

    def filled(self) -> int:
        """How many images have a row, going by their entries alone."""
        entries = np.fromfile(self.entries, ENTRY)
        return int(((entries["bytes"] == self.stamps[:, 0]) & (entries["changed"] == self.stamps[:, 1])).sum())

    def read(self, row: int) -> tuple[torch.Tensor, tuple[int, int]] | None:
        """A row: Z (P_v, D_v) of an image and the image's (width, height); None if it is not there."""
        try:
            with open(self.entries, "rb") as file:
                file.seek(row * ENTRY.itemsize)
                entry = np.frombuffer(file.read(ENTRY.itemsize), ENTRY)[0]
            if (entry["bytes"], entry["changed"]) != tuple(self.stamps[row]):
                return None
            with open(self.path, "rb") as file:
                file.seek(row * self.row_bytes)
                values = bytearray(file.read(self.row_bytes))
        except (OSError, IndexError, ValueError):                                                    # shortened while we run
            return None
        size = int(entry["width"]), int(entry["height"])
        if checksum(values, size) != entry["checksum"]:
            if not self.warned:
                runtime.log(f"{self.path}: row {row} is damaged; it and others like it are encoded again")
            self.warned = True
            return None
        return torch.frombuffer(values, dtype=self.dtype).view(self.shape), size

    def write(self, rows: list[tuple[int, tuple[int, int]]], Z: torch.Tensor) -> None:
        """Rows, as (number, image size), of Z (N, P_v, D_v) on the host; then their entries."""
        numbers = Z.contiguous().flatten(1).view(torch.uint8).numpy()                                # (N, row_bytes)
        try:
            with open(self.path, "r+b") as file:
                for (row, _), values in zip(rows, numbers):
                    file.seek(row * self.row_bytes)
                    file.write(values)
            with open(self.entries, "r+b") as file:
                for (row, size), values in zip(rows, numbers):
                    file.seek(row * ENTRY.itemsize)
                    file.write(np.array((*self.stamps[row], *size, checksum(values, size)), ENTRY).tobytes())
        except OSError as error:
            raise InputError(f"--cache-features {self.path}: cannot write to it ({error.strerror}); make room, or leave it out") from None

    # ---- samples and batches

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        row = self.rows[index]
        found = None if row is None else self.read(row)
        if found is None:
            return self.records[index] | dict(row=row, features=None)
        return self.records.sample(index, image_size=found[1]) | dict(row=row, features=found[0])

    def collate(self, samples, pad_id) -> dict:
        """`data.collate`, and of the N images those that were there and those that were not: features (N - M, P_v, D_v), missing, a list
        of M (row, image size), and order (N,), where each image stands in the two put together."""
        images = [sample for sample in samples if sample["row"] is not None]
        there = torch.tensor([sample["features"] is not None for sample in images], dtype=torch.bool)
        features = [sample["features"] for sample in images if sample["features"] is not None]
        return data.collate(samples, pad_id) | dict(
            features=torch.stack(features) if features else torch.empty(0, *self.shape, dtype=self.dtype),
            missing=[(sample["row"], sample["image_size"]) for sample in images if sample["features"] is None],
            order=torch.where(there, there.cumsum(0) - 1, len(features) + (~there).cumsum(0) - 1))

    @torch.no_grad()
    def complete(self, model, batch: dict) -> dict:
        """The batch with "features" of all its images, (N, P_v, D_v) float32; on a GPU without waiting for it. New ones are rounded to the
        dtype of the file, like those that are read from it."""
        features, missing = batch["features"], batch["missing"]
        self.asked, self.found = self.asked + len(features) + len(missing), self.found + len(features)
        if missing:
            Z = model.encode(batch["pixel_values"]).to(self.dtype)
            self.flush()
            copied = torch.cuda.Event() if Z.is_cuda else None
            self.pending = missing, Z.to("cpu", non_blocking=True), copied
            if copied:
                copied.record()                                                                      # the copy is read a step later
            else:
                self.flush()
            features = torch.cat([features, Z]).index_select(0, batch["order"])
        return batch | dict(features=features.float())

    def flush(self) -> None:
        """Write what is still on its way from the GPU."""
        if self.pending:
            rows, Z, copied = self.pending
            if copied:
                copied.synchronize()
            self.write(rows, Z)
            self.pending = None

    def share(self) -> float | None:
        """Which share of this process's images was there, since the last call."""
        share, self.asked, self.found = runtime.mean(self.found, self.asked), 0, 0
        return share


def checksum(values, size: tuple[int, int]) -> int:
    """CRC-32 of a row's bytes and its image's size."""
    return zlib.crc32(values, zlib.crc32(np.array(size, "<i4").tobytes()))


def fingerprint(encoder: torch.nn.Module) -> str:
    """Hash of an encoder: its settings, less names and versions, and every tensor, wherever it was loaded from."""
    settings = {k: v for k, v in encoder.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    code = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in encoder.state_dict().items():
        code.update(name.encode())
        code.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return code.hexdigest()
