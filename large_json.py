"""Large JSON files read by position, for formats.py: lists are scanned once, and of each object only its position stays in memory. Apart
so that each reads in one sitting.

    scan_json      every element of a file's lists, with its position
    Objects        the objects of some lists, grouped by a key and read when asked for; also of JSONL
"""
import codecs
import json
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from data import InputError


def scan_json(path: Path, lists: set) -> Iterator[tuple[str | None, object, int, int]]:
    """(list's name, element, first byte, last byte + 1) of every element of the lists of a JSON object, or of a JSON list (name None); the
    names of all lists, also empty ones, are added to `lists`.

    The file is read a piece at a time and decoded as Latin-1, a character for a byte, so that positions in the text are positions in the
    file; elements beyond ASCII are then read again as UTF-8. InputError: not UTF-8, or not JSON.
    """
    decode, utf8 = json.JSONDecoder().raw_decode, codecs.getincrementaldecoder("utf-8")()
    text, base, at, size = "", 0, 0, 2**18
    with open(path, "rb") as file:
        def more() -> bool:
            nonlocal text, base, at
            piece = file.read(size)
            try:
                utf8.decode(piece, final=not piece)
            except UnicodeDecodeError:
                raise InputError(f"{path}: not UTF-8 text (near byte {base + len(text)}); save it as UTF-8") from None
            text, base, at = text[at:] + piece.decode("latin-1"), base + at, 0
            return bool(piece)

        def sign() -> str:                               # the next character that is not blank
            nonlocal at
            while True:
                while at < len(text) and text[at] in " \t\r\n":
                    at += 1
                if at < len(text) or not more():
                    return text[at: at + 1]

        def expect(signs: str) -> str:
            nonlocal at
            if (found := sign()) == "" or found not in signs:
                raise InputError(f"{path}: not valid JSON at byte {base + at}: expected one of {signs}")
            at += 1
            return found

        def value():
            nonlocal at, size
            sign()
            while True:
                try:
                    found, end = decode(text, at)
                    if not isinstance(found, int | float) or (end < len(text) and text[end] in ",]} \t\r\n"):
                        own, at = text[at:end], end      # a number ends where something else begins, maybe in the next piece
                        return found if own.isascii() else json.loads(own.encode("latin-1").decode())
                except json.JSONDecodeError as error:
                    reason = error.msg
                except RecursionError:
                    raise InputError(f"{path}: nested too deep near byte {base + at}") from None
                else:
                    reason = "it ends too early"
                size *= 1 + (at == 0)                    # an element longer than the piece, not only cut by its end
                if not more():
                    raise InputError(f"{path}: not valid JSON near byte {base + at}: {reason}")

        def elements(name: str | None):
            nonlocal at
            lists.add(name)
            if sign() == "]":
                at += 1
                return
            while True:
                sign()
                start = base + at
                found = value()
                yield name, found, start, base + at
                if expect(",]") == "]":
                    return

        while len(text) < 3 and more():
            pass
        if text.startswith("\xef\xbb\xbf"):              # the byte order mark
            at = 3
        if expect("[{") == "[":
            yield from elements(None)
        elif sign() == "}":
            at += 1
        else:
            while True:
                name = value()
                expect(":")
                if sign() == "[":
                    at += 1
                    yield from elements(name)
                else:
                    value()
                if expect(",}") == "}":
                    break
        if sign():
            raise InputError(f"{path}: more at byte {base + at}, after the JSON has ended; for one object per line name the file .jsonl")


class Objects:
    """The objects of a file's lists, grouped by a key and read when asked for: only their positions stay in memory.

    by: {name of a list: key that its objects are grouped by, as text, None = their number}; a file that is one list, or lines of objects
    (JSONL), is the list None. Elements without the key are left out and told in `problems`. InputError: no such list, or none has the key.
    """

    def __init__(self, path: str, by: dict[str | None, str | None], what: str):
        self.path, self.spans = Path(path), {name: {} for name in by}
        self.problems, lists, count, bad = [], set(), Counter(), Counter()
        for name, element, start, end in self._lines(lists) if self.path.suffix == ".jsonl" else scan_json(self.path, lists):
            if name not in by:
                continue
            key = count[name] if by[name] is None else element.get(by[name]) if isinstance(element, dict) else None
            count[name] += 1
            if isinstance(key, int | str):
                self.spans[name].setdefault(str(key), array("q")).extend((start, end))
            else:
                bad[name] += 1
        for name, key in by.items():
            if name not in lists or bad[name] == count[name] > 0 or name is None and not count[name]:
                missing = f'{name}[0] has no "{key}"' if bad[name] else f"has no {'records' if name is None else f'list {name!r}'}"
                raise InputError(f"{path}: {missing}; is this {what}?")
        self.problems = [f'{path}: {n} of {name} have no "{by[name]}"' for name, n in bad.items()]
        self.file = open(path, "rb")

    def _lines(self, lists):
        start = 0
        lists.add(None)
        with open(self.path, "rb") as file:
            for line in file:
                if line.strip():
                    yield None, None, start, start + len(line)
                start += len(line)

    def get(self, name: str | None, key) -> list:
        """The objects of a list with this key, none if there are none."""
        spans, found = self.spans[name].get(str(key), ()), []
        for start, end in zip(spans[::2], spans[1::2]):
            self.file.seek(start)
            try:
                found.append(json.loads(self.file.read(end - start).decode("utf-8-sig")))                # a first line may have a mark
            except UnicodeDecodeError:
                raise InputError(f"{self.path}: byte {start}: not UTF-8 text") from None
            except json.JSONDecodeError as error:
                raise InputError(f"{self.path}: byte {start + error.pos}: not valid JSON ({error.msg})") from None
        return found
