"""Every record before the first step: what any step would refuse, and what there is to learn.

    learns = check_records(dataset, skip_bad=False)

Records are shared among all processes and all their cores. No pixel is decoded: only headers of
images, regions against their size, and texts as tokens. What is wrong is listed, up to LISTED of
it. Either that ends the run, or (--skip-bad) those records are left out.
"""
import contextlib
import math
import os

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import runtime
from labels import check_frame, region_bounds
from runtime import InputError

SAMPLE, LISTED = 1000, 20       # records whose patches and units are looked at; problems told
CHUNK, ALONE = 64, 500          # records at a time; as many or fewer need no other processes


class Examined(torch.utils.data.Dataset):
    """Chunks of record numbers -> what is known of each: see `examine`."""

    def __init__(self, dataset: data.Records, chunks: list[list[int]], sample: set[int]):
        self.dataset, self.chunks, self.sample = dataset, chunks, sample

    def __len__(self):
        return len(self.chunks)

    def __getitem__(self, number):
        return [examine(self.dataset, i, i in self.sample) for i in self.chunks[number]]


def examine(dataset: data.Records, index: int, closely: bool) -> dict:
    """{index, problem (None: usable), turned, clipped, regions}; closely: also labelled, patches of
    its image with a label, and boxes, (name, [x0, y0, x1, y1] as it was given, image size)."""
    found = dict(index=index, problem=None, turned=0, clipped=0, regions=0, labelled=None, boxes=[])
    try:
        size, turn, bounds = dataset.check(index)
        if size is not None:
            out = [b is not None and (min(b[:2]) < -1 or b[2] > size[0] + 1 or b[3] > size[1] + 1)
                   for b in bounds]             # up to one pixel is rounding
            found |= dict(turned=int(turn > 1), clipped=int(sum(out)), regions=len(bounds))
            if closely:
                found["labelled"] = int(dataset.targets(index, size)[1].any(-1).sum())
    except InputError as error:
        found["problem"] = str(error)
    if closely:
        with contextlib.suppress(InputError):
            record = dataset.records[index]
            if isinstance(record, dict) and record.get("image") and record.get("regions"):
                size, _ = dataset.header(index)
                found["boxes"] = given_boxes(record["regions"], dataset.where(index), size)
    return found


def given_boxes(regions: list, where: str, size: tuple[int, int]) -> list[tuple]:
    """(name, box, image size) of regions, right or wrong, where there are numbers."""
    boxes = []
    for i, region in enumerate(regions if isinstance(regions, list) else []):
        box = region.get("bbox") if isinstance(region, dict) else None
        if isinstance(region, dict) and "polygon" in region:
            try:
                box = region_bounds(region, where).tolist()
            except InputError:
                continue
        numbers = isinstance(box, list) and all(isinstance(n, int | float) for n in box)
        if numbers and len(box) == 4 and all(map(math.isfinite, box)):
            boxes.append((f"{where}: regions[{i}]", box, size))
    return boxes


def gathered(found: list) -> list:
    """The lists of all processes as one."""
    if runtime.world() == 1:
        return found
    lists = [None] * runtime.world()
    dist.all_gather_object(lists, found)
    return [item for own in lists for item in own]


def check_records(dataset: data.Records, skip_bad: bool = False,
                  every: bool = True) -> float | None:
    """Check all records, or (not `every`) a sample of them, and say what was found.

    dataset: Records, or the cache in their place, which knows sizes of images.
    skip_bad: the dataset is left without the bad ones, and passes over images that turn out broken
    when they are decoded. -> the mean number of labelled patches of an image, None without images.
    InputError: a record that cannot be used, or boxes that look like another unit, all together.
    """
    dataset = getattr(dataset, "dataset", dataset)
    numbers = list(range(len(dataset)))
    sample = runtime.spread(numbers, SAMPLE)
    numbers = numbers if every else sample
    chunks = runtime.split(numbers, CHUNK)[runtime.rank(): None: runtime.world()]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")    # or it warns of every fork
    loader = DataLoader(Examined(dataset, chunks, set(sample)), batch_size=None, collate_fn=list,
                        num_workers=cores if len(numbers) > ALONE and cores > 1 else 0)
    found = []
    with tqdm(total=sum(map(len, chunks)), desc="check records", disable=runtime.rank() > 0,
              leave=False, mininterval=1) as progress:
        for several in loader:
            found += several
            progress.update(len(several))
    found = sorted(gathered(found), key=lambda one: one["index"])

    boxes = [box for one in found for box in one["boxes"]]
    bad = [one for one in found if one["problem"]]
    if len(boxes) > 2 or not bad:                       # one or two tell less than their records
        check_frame(*([box[i] for box in boxes] for i in range(3)))
    if bad:
        for one in bad[:LISTED]:
            runtime.log(f"  {one['problem']}")
        more = f"{len(bad)} of {len(found)} records cannot be used"
        if not skip_bad:
            first = bad[0]["problem"].removeprefix(f"{dataset.source}: ")
            raise InputError(f"{dataset.source}: {first}" if len(bad) == 1 else
                             f"{dataset.source}: {more}, the first: {first}; mend them, or leave"
                             " them out with --skip-bad")
        runtime.log(f"{dataset.source}: {more} and are left out")
        dataset.leave_out(one["index"] for one in bad)
    dataset.skip_bad = skip_bad

    turned, clipped, regions = (sum(one[key] for one in found)
                                for key in ("turned", "clipped", "regions"))
    labelled = [one["labelled"] for one in found if one["labelled"] is not None]
    mean = sum(labelled) / len(labelled) if labelled else None
    if not mean:                                        # rare regions may all be off the sample
        rest = [one["index"] for one in found if one["regions"] and not one["problem"]]
        place = {number: i for i, number in enumerate(dataset.numbers)}
        for index in map(place.get, runtime.spread(rest, SAMPLE)):
            size, _, _ = dataset.check(index)
            mean = mean or int(dataset.targets(index, size)[1].any(-1).sum()) / len(found)
    told = [f"{len(found) - len(bad)} records checked"]
    if labelled and regions:
        none = labelled.count(0) / len(labelled)
        told.append(f"of {dataset.patches} patches an image, {mean:.1f} are labelled; {none:.0%} of"
                    " the images have none")
    if turned:
        told.append(f"{turned} images are turned by EXIF, and regions are on the upright ones")
    if clipped:
        told.append(f"{clipped} of {regions} regions stick out of their image and are clipped")
    runtime.log(f"{dataset.source}: " + "; ".join(told))
    return mean
