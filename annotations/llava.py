"""LLaVA records as they are, less what does not fit their images."""
from annotations import Source, checked, listed, photo
from data import check_turns, read_records
from labels import region_phrase
from runtime import InputError


def answer_of(record: dict, where: str) -> str:
    """What the assistant first says. InputError: not a conversation that training takes."""
    turns = check_turns(record.get("conversations"), record.get("image") is not None, where)
    return turns[1][1]


def cleaned(record: dict, args, where: str, problems) -> dict:
    """The record without the regions that do not fit its image.

    InputError: its image is broken, or it is no conversation.
    """
    answer_of(record, where)
    if record.get("image") is None:
        if record.get("regions"):
            raise InputError(f'{where}: "image" is missing, which its regions are about')
        return record
    seen, regions = photo(record["image"], args, where, "upright", problems), []
    for i, region in enumerate(record.get("regions") or []):
        spot = f"{where}: regions[{i}]"
        with listed(problems, spot):
            region_phrase(region, spot)
            regions.append(checked(region, seen.size, spot, problems))
    return record | {"regions": seen.regions(regions)} if "regions" in record else record


def read(args) -> Source:
    """The records of the file."""
    records = read_records(args.data)

    def one(number: int, problems: list[str]) -> list[dict]:
        where = f"{args.data}: record {records[number].get('id', number)}"
        return [cleaned(records[number], args, where, problems)]

    return Source(len(records), one, inputs=[args.data])
