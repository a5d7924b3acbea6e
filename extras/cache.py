"""Z of the frozen encoder, kept on disk: later epochs and runs decode no image and run no encoder.

    dataset = FeatureCache("cache", model, records)     # in the place of `records`
    batch = dataset.complete(to_device(batch))          # encodes what was not there, and keeps it

Three files in the folder, named after a hash of the key:

    NAME-HASH.json       the key: all that Z depends on, and must be equal
    NAME-HASH.features   (images, P_v, D_v), memory-mapped, filled as images come up
    NAME-HASH.there      per image its (width, height) in pixels once its row is whole, else zeros

A row is written before its size, so half a row is never read. Several processes may read and write.
"""
import errno
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch

import data
import runtime
from runtime import InputError


class FeatureCache(torch.utils.data.Dataset):
    """Records as samples with "features" (P_v, D_v), where they are there, in place of pixels.

    One row per image, however many records show it. InputError: no room for what is missing.
    """

    def __init__(self, folder, model, records: data.Records):
        self.dataset, self.model = records, model
        images = [r.get("image") if isinstance(r, dict) else None for r in records.records]
        folder_of = Path(records.image_dir or "")
        names = sorted({n for n in images if isinstance(n, str) and (folder_of / n).is_file()})
        self.numbers = {name: i for i, name in enumerate(names)}
        records.known_size = self.known_size            # of what is here no image is looked at
        self.shape = model.encoder_patches, model.encoder.config.hidden_size        # P_v, D_v
        self.dtype = next(model.encoder.parameters()).dtype
        row_bytes = self.shape[0] * self.shape[1] * self.dtype.itemsize
        stats = [os.stat(folder_of / name) for name in names]
        stamps = [(n, s.st_size, s.st_mtime_ns) for n, s in zip(names, stats)]
        key = dict(
            encoder=model.config["vision"], weights=fingerprint(model.encoder),
            feature_layer=model.config["feature_layer"], dtype=str(self.dtype),
            shape=self.shape, image_form=records.image_form,
            image_dir=str(Path(records.image_dir or "").resolve()), images=len(names),
            files=hashlib.sha256(json.dumps(stamps).encode()).hexdigest())
        text = json.dumps(key, indent=1)
        code = hashlib.sha256(text.encode()).hexdigest()[:16]
        path = Path(folder) / f"{Path(model.config['vision']).name}-{code}.features"
        there, lengths = path.with_suffix(".there"), [len(names) * row_bytes, len(names) * 8]
        files = list(zip((path, there), lengths))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = path.with_suffix(".json").exists() and all(
                file.exists() and file.stat().st_size == length for file, length in files)
            runtime.barrier()                               # every process has looked
            if not whole and int(os.environ.get("LOCAL_RANK", 0)) == 0:     # a folder per machine
                for file, length in files:
                    with runtime.atomic(file) as temporary, open(temporary, "wb") as handle:
                        if length:                          # a full disk is an error now, not later
                            os.posix_fallocate(handle.fileno(), 0, length)
                with runtime.atomic(path.with_suffix(".json")) as temporary:
                    temporary.write_text(text)              # last: with it the other two are whole
            runtime.barrier()
        except (OSError, InputError) as error:
            reason = getattr(error, "strerror", None) or os.strerror(errno.ENOSPC)
            raise InputError(f"--cache-features {folder}: {reason}; {lengths[0] / 1e9:,.3f} GB are"
                             " needed; name another folder, or leave it out") from None
        shape = max(1, len(names)), row_bytes
        self.Z = np.memmap(path, np.uint8, "r+", shape=shape) if names else None
        self.sizes = np.memmap(there, np.int32, "r+", shape=(shape[0], 2)) if names else None
        self.pending, self.asked, self.found = None, 0, 0
        here = int((self.sizes[:, 0] > 0).sum()) if names else 0
        runtime.log(f"features: {here:,} of {len(names):,} images are in {path}")

    @property
    def records(self) -> list[dict]:
        """Those of the dataset, some of which may have been left out."""
        return self.dataset.records

    def row_of(self, index: int) -> int | None:
        """The row of a record's image; None without one."""
        return self.numbers.get(self.records[index].get("image"))

    def known_size(self, index: int) -> tuple[int, int] | None:
        """(width, height) of a record's image, if its features are here."""
        row = self.row_of(index)
        there = row is not None and self.sizes[row].all()
        return tuple(self.sizes[row].tolist()) if there else None

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        row = self.row_of(index)
        if row is None or not self.sizes[row].all():
            sample = self.dataset[index]                    # maybe another one, if it is broken
            return sample | dict(row=self.row_of(sample["index"]), features=None)
        Z = torch.from_numpy(self.Z[row].copy()).view(self.dtype).view(self.shape)
        sample = self.dataset.sample(index, tuple(self.sizes[row].tolist()))
        return sample | dict(row=row, features=Z)

    def collate(self, samples) -> dict:
        """The dataset's batch, and of its N images those that were there and those that were not.

        features (N - M, P_v, D_v); missing, a list of M (row, image size); order (N,), where each
        image stands in the two put together.
        """
        images = [s for s in samples if s["row"] is not None]
        there = torch.tensor([s["features"] is not None for s in images], dtype=torch.bool)
        features = [s["features"] for s in images if s["features"] is not None]
        missing = [(s["row"], s["image_size"]) for s in images if s["features"] is None]
        later = len(features) + (~there).cumsum(0) - 1
        nothing = torch.empty(0, *self.shape, dtype=self.dtype)
        return self.dataset.collate(samples) | dict(
            features=torch.stack(features) if features else nothing, missing=missing,
            order=torch.where(there, there.cumsum(0) - 1, later))

    @torch.no_grad()
    def complete(self, batch: dict) -> dict:
        """The batch with "features" of all its images, (N, P_v, D_v) float32.

        New rows are rounded to the file's dtype, like those that are read from it. On a GPU their
        copy is written a step later: no step waits for it.
        """
        features, missing = batch["features"], batch["missing"]
        self.asked += len(features) + len(missing)
        self.found += len(features)
        if missing:
            Z = self.model.encode(batch["pixel_values"]).to(self.dtype)
            self.flush()
            copied = torch.cuda.Event() if Z.is_cuda else None
            self.pending = missing, Z.to("cpu", non_blocking=True), copied
            if copied:
                copied.record()
            else:
                self.flush()
            features = torch.cat([features, Z]).index_select(0, batch["order"])
        return batch | dict(features=features.float())

    def flush(self) -> None:
        """Write the rows that are still on their way from the GPU; then their sizes."""
        if self.pending:
            missing, Z, copied = self.pending
            if copied:
                copied.synchronize()
            rows, sizes = zip(*missing)
            self.Z[list(rows)] = Z.contiguous().flatten(1).view(torch.uint8).numpy()
            self.sizes[list(rows)] = sizes
            self.pending = None

    def metrics(self) -> dict:
        """{cache_hits: share of this process's images that were there since the last call}."""
        share, self.asked, self.found = runtime.mean(self.found, self.asked), 0, 0
        return dict(cache_hits=share)


def fingerprint(encoder: torch.nn.Module) -> str:
    """Hash of an encoder's settings and tensors, wherever it was loaded from."""
    settings = encoder.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        settings.pop(name, None)
    code = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in encoder.state_dict().items():
        code.update(name.encode())
        code.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return code.hexdigest()
