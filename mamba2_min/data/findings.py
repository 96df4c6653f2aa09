"""What was found while documents were read, and the lines that tell a user about it."""

from __future__ import annotations

from collections import Counter

GUIDE = "docs/preparing_documents.md"
_TYPES = 8  # types of files that get a line each
_PROBLEMS = 5  # problems with records that are listed in full


class Tally:
    """How often something was found, and in which files."""

    def __init__(self) -> None:
        self.files: Counter[str] = Counter()

    def add(self, file: str, count: int = 1) -> None:
        if count:
            self.files[file] += count

    @property
    def count(self) -> int:
        return sum(self.files.values())

    def names(self) -> str:
        """The files, those with the most first: "a.md, b.md, c.md and 12 more"."""
        return listed(sorted(self.files, key=lambda name: (-self.files[name], name)), 3)


class Findings:
    """Counts of everything that is skipped, left out or changed while the documents of a folder are read."""

    def __init__(self) -> None:
        self.links, self.not_regular = Tally(), Tally()
        self.other_types: dict[str, Tally] = {}  # by the ending of a file's name
        self.empty, self.not_prose = Tally(), Tally()
        self.records, self.bad_records = Tally(), Tally()
        self.shapes: Counter[str] = Counter()  # of the records that were read
        self.problems: dict[str, list[str]] = {}  # of the records that were not, and where each was met
        self.front_matter, self.base64, self.unbroken, self.controls = Tally(), Tally(), Tally(), Tally()
        self.base64_size = 0

    def record(self, file: str, shape: str) -> None:
        self.records.add(file)
        self.shapes[shape] += 1

    def bad_record(self, file: str, where: str, problem: str) -> None:
        self.bad_records.add(file)
        self.problems.setdefault(problem, []).append(f"{file}, {where}")

    def notes(self) -> list[str]:
        """A line for each kind of finding, in the order of reading."""
        return [*self._on_files(), *self._on_records(), *self._on_text()]

    def _on_files(self) -> list[str]:
        notes = []
        if self.links.count:
            notes.append(f"{counted(self.links.count, 'symbolic link')} not followed")
        if self.not_regular.count:
            kind = counted(self.not_regular.count, "pipe or device", "pipes or devices")
            notes.append(f"{kind} skipped: {self.not_regular.names()}")
        types = sorted(self.other_types.items(), key=lambda item: (-item[1].count, item[0]))
        for suffix, files in types[:_TYPES]:
            one, several = (f"{suffix} file", "") if suffix else ("file without an ending", "files without an ending")
            notes.append(f"{counted(files.count, one, several)} not read: {files.names()} ({GUIDE})")
        if types[_TYPES:]:
            rest = ", ".join(f"{files.count:,} {suffix or 'without an ending'}" for suffix, files in types[_TYPES:])
            notes.append(f"files of other types not read: {rest}")
        if self.empty.count:
            notes.append(f"{counted(self.empty.count, 'file')} without text skipped")
        return notes

    def _on_records(self) -> list[str]:
        notes = []
        if self.records.count:
            shapes = ", ".join(f"{count:,} by {shape}" for shape, count in self.shapes.most_common())
            files = counted(len(self.records.files), "file")
            notes.append(f"{counted(self.records.count, 'record')} of {files} read as documents: {shapes}")
        if self.bad_records.count:
            skipped = f"{counted(self.bad_records.count, 'record')} of {counted(len(self.bad_records.files), 'file')}"
            notes.append(f"{skipped} skipped: {self.first_problems()} ({GUIDE})")
        return notes

    def first_problems(self) -> str:
        """The most frequent problems with records, and where each occurred first."""
        problems = sorted(self.problems.items(), key=lambda item: -len(item[1]))
        told = [f"{listed(places, 1)}: {problem}" for problem, places in problems[:_PROBLEMS]]
        return "; ".join(told) + ("; ..." if problems[_PROBLEMS:] else "")

    def _on_text(self) -> list[str]:
        notes = []
        if self.not_prose.count:
            files = counted(self.not_prose.count, "file")
            notes.append(f"{files} of markup or data instead of prose read as text: {self.not_prose.names()} ({GUIDE})")
        if self.front_matter.count:
            notes.append(f"front matter left out of {counted(self.front_matter.count, 'file')}")
        if self.base64.count:
            things = counted(self.base64.count, "picture or other data", "pictures or other data")
            notes.append(f"{things} in base64 left out, {self.base64_size:,} bytes: {self.base64.names()}")
        if self.unbroken.count:
            strings = counted(self.unbroken.count, "very long string")
            notes.append(f"{strings} without a space, which no vocabulary has: {self.unbroken.names()}")
        if self.controls.count:
            signs = counted(self.controls.count, "control character")
            notes.append(f"{signs} replaced or left out: {self.controls.names()}")
        return notes


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number with its noun: 1 file, 2,000 files."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def listed(names: list[str], most: int) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")
