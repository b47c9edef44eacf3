"""The paper's tables, and which runs of ours stand beside which of their rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from better_attention.lab import published
from better_attention.lab.analysis.departures import changed_settings, other_samples, told
from better_attention.lab.analysis.estimates import Estimate
from better_attention.lab.analysis.study import Record
from better_attention.lab.analysis.summary import COLUMNS, Column, Row, summarise
from better_attention.lab.files import parse_json, read_regular
from better_attention.lab.runs import manifest

EDGE = 4
"""The table of inference times, which no training run has figures for: :mod:`better_attention.bench.edge` has."""


@dataclass(frozen=True, slots=True)
class Part:
    """The share of one data set in a table.

    Args:
        task: name of our task.
        rows: key of the paper's rows, see :func:`published.rows`.
        largest: the rows of the most heads alone.
        equal_params: the runs of ``compare --equal-params``.
    """

    task: str
    rows: str
    largest: bool = False
    equal_params: bool = False

    def published(self) -> list[published.Row]:
        """The paper's rows, in its order."""
        rows = published.rows(self.rows)
        most = max(int(str(row["heads"])) for row in rows)
        return [row for row in rows if not self.largest or row["heads"] == most]

    @property
    def command(self) -> str:
        """What runs the paper's rows of this part."""
        heads = ",".join(dict.fromkeys(str(row["heads"]) for row in self.published()))
        options = " --equal-params" if self.equal_params else ""
        return f"better-attention compare {self.task} --scale paper --heads {heads}{options}"


def _parts(*tasks: str, largest: bool = False) -> tuple[Part, ...]:
    return tuple(Part(task, task, largest) for task in tasks)


TABLES: Mapping[int, tuple[str, tuple[Part, ...]]] = MappingProxyType(
    {
        1: ("classification of images", _parts("mnist", "cifar100", "imagenet", largest=True)),
        2: ("classification of texts", _parts("imdb", "amazon", largest=True)),
        3: ("translation, English to Spanish", _parts("translation", largest=True)),
        5: ("MNIST over numbers of heads", _parts("mnist")),
        6: ("CIFAR100 over numbers of heads", _parts("cifar100")),
        7: ("ImageNet, models of about equal size", (Part("imagenet", "imagenet-equal-size", equal_params=True),)),
        8: ("IMDB over numbers of heads", _parts("imdb")),
        9: ("Amazon reviews over numbers of heads", _parts("amazon")),
        10: ("translation over numbers of heads", _parts("translation")),
    }
)
"""Number of a table -> what it shows, and its parts. Tables 1 to 3 are the rows of the most heads of the later ones."""


@dataclass(slots=True)
class Ours:
    """Runs of one setting, which may lie in several files.

    Args:
        scale: the scale they were asked for.
        changed: settings in which they differ from the paper's scale, and ``samples`` if there were fewer or more;
            None: the record does not tell.
        departures: why their data is not the set that the paper used, as sentences.
        files: where they came from.
        records: one a run.
    """

    scale: str
    changed: Mapping[str, object] | None
    departures: tuple[str, ...] = ()
    files: list[Path] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)

    @property
    def paper_scale(self) -> bool:
        """Whether the setting is the paper's, as far as it is known."""
        return self.scale == "paper" and not self.changed and not self.departures

    def description(self) -> str:
        """Scale, what differs from the paper's, and the files, for people."""
        if self.changed is None:
            settings = "" if self.scale == "paper" else ", not the paper's scale"
            settings += " (no settings recorded)"
        elif self.changed:
            named = told(str(self.records[0]["task"]), self.changed)
            settings = f", not the paper's {'setting' if self.scale == 'paper' else 'scale'} ({named})"
        else:
            settings = "" if self.scale == "paper" else " (its settings are those of the paper's scale)"
        return f"scale {self.scale}{settings}; {', '.join(map(str, self.files))}"


@dataclass(frozen=True, slots=True)
class Line:
    """One mechanism at one number of heads: ``published`` by the paper, run as ``ours``, or both."""

    mechanism: str
    heads: int
    published: published.Row | None
    ours: Row | None

    @property
    def seeds(self) -> int:
        """Number of our seeds; 0: not run."""
        return len(self.ours.seeds) if self.ours else 0

    def estimate(self, key: str) -> Estimate | None:
        """Our figure."""
        return self.ours.estimates.get(key) if self.ours else None

    def paper(self, key: str) -> float | int | None:
        """The paper's figure."""
        value = self.published.get(key) if self.published else None
        return value if isinstance(value, int | float) else None

    def seconds(self, *, theirs: bool) -> float | None:
        """Seconds of an epoch, ours or the paper's."""
        ours = self.estimate("epoch_seconds")
        return self.paper("epoch_seconds") if theirs else ours.mean if ours else None

    def difference(self, key: str) -> float | None:
        """Ours less the paper's."""
        ours, theirs = self.estimate(key), self.paper(key)
        return None if ours is None or theirs is None else ours.mean - theirs

    def count_agrees(self, key: str) -> bool | None:
        """Whether our number of parameters is the paper's, to the last digit that the paper prints; None: unknown."""
        difference, theirs = self.difference(key), self.paper(key)
        return None if difference is None or theirs is None else abs(difference) < printed_unit(int(theirs))


@dataclass(frozen=True, slots=True)
class Block:
    """The paper's rows of one data set beside the runs of one setting, or beside nothing."""

    part: Part
    ours: Ours | None
    lines: Sequence[Line]

    @property
    def not_run(self) -> list[Line]:
        """The paper's rows for which there is no run of ours."""
        return [line for line in self.lines if not line.seeds]

    def columns(self) -> list[Column]:
        """What the paper prints, and the pace against torch's own layer where we have it."""
        return [
            column
            for column in COLUMNS
            if any(line.paper(column.key) is not None for line in self.lines)
            or (column.key == "times_as_fast" and any(line.estimate(column.key) for line in self.lines))
        ]

    def wrong_counts(self) -> list[tuple[Line, Column]]:
        """Where our number of parameters is not the paper's."""
        sizes = [column for column in self.columns() if column.kind == "size"]
        return [(line, column) for line in self.lines for column in sizes if line.count_agrees(column.key) is False]

    def times_as_fast(self, line: Line, *, theirs: bool) -> float | None:
        """How many times as fast as standard attention with as many heads: ours, or the paper's; above 1 is faster.

        Ours is the quotient of both speeds relative to ``nn.MultiheadAttention`` where both were measured, alternately
        with the same model on torch's layer. Seconds of runs that are hours apart also depend on the machine's load.
        """
        standard = [other for other in self.lines if (other.mechanism, other.heads) == ("standard", line.heads)]
        paces = [one.estimate("times_as_fast") for one in (line, *standard)]
        if not theirs and len(paces) == 2 and paces[0] and paces[1]:
            return paces[0].mean / paces[1].mean
        seconds = [one.seconds(theirs=theirs) for one in (line, *standard)]
        return seconds[1] / seconds[0] if len(seconds) == 2 and seconds[0] and seconds[1] else None


def printed_unit(count: int) -> int:
    """The unit to which the paper gives a number of parameters: it prints ``66K`` and ``2.36M`` where it cuts.

    >>> printed_unit(66048), printed_unit(66_000), printed_unit(2_360_000)
    (1, 1000, 10000)
    """
    zeros = len(str(count)) - len(str(count).rstrip("0"))
    # One zero or two at the end may be the count's own.
    return 10**zeros if zeros >= 3 else 1


def blocks(table: int, files: Sequence[Path]) -> list[Block]:
    """Table ``table`` of the paper beside the runs in ``files``.

    A block for each data set and each setting of ours; runs of one setting in several files are brought together,
    unless they contradict each other (two records of one seed): then they stay apart.

    Raises:
        ValueError: no such table, or a damaged file.
    """
    if table not in TABLES:
        raise ValueError(f"table {table} has no results of training; {', '.join(map(str, TABLES))} have.")
    records = [(file, record) for file in files for record in read_results(file)]
    found = []
    for part in TABLES[table][1]:
        sources = _together(part, records)
        found += [Block(part, ours, _lines(part, ours)) for ours in sources] or [Block(part, None, _lines(part, None))]
    return found


def find_results(paths: Sequence[Path], name: str = "results.json") -> list[Path]:
    """The files called ``name``: those given, those in the folders given and in the folders directly below them.

    Args:
        paths: files and folders; none: ``results/*/`` and ``runs/*/`` of the working directory.

    Raises:
        FileNotFoundError: a path that does not exist, or a folder without any such file.
    """
    if not paths:
        return [file for folder in ("results", "runs") for file in sorted(Path(folder).glob(f"*/{name}"))]
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist: name a {name}, or a folder that holds one.")
        inside = [path / name] if (path / name).is_file() else sorted(path.glob(f"*/{name}"))
        if path.is_dir() and not inside:
            raise FileNotFoundError(
                f"{path} holds no {name}, nor does a folder in it. Name the --out of the command that writes one."
            )
        found += inside if path.is_dir() else [path]
    # A folder and a file in it may both be named.
    return list(dict.fromkeys(found))


def read_results(path: Path) -> list[Record]:
    """The records in a ``results.json``.

    Raises:
        ValueError: the file is damaged; names it and what is wrong.
    """
    damaged = f"{path} is damaged or no results.json"
    content = read_regular(path)
    try:
        records = parse_json(content)
    except ValueError as error:
        raise ValueError(f"{damaged}: {error}. The command that made it writes it again.") from None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{damaged}: expected a list of objects, one a run.")
    try:
        # Only to learn whether tables can be made of these records; the result is not used.
        summarise(records)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ValueError(f"{damaged}: {error}") from None
    # Last, because what the checks before can say of a changed file is more precise.
    manifest.check_listed(path)
    return records


def _together(part: Part, records: Sequence[tuple[Path, Record]]) -> list[Ours]:
    """The runs of a part, those of one setting together; the paper's setting first."""
    found: list[Ours] = []
    for file, record in records:
        settings = record.get("settings")
        settings = settings if isinstance(settings, Mapping) else None
        if record["task"] != part.task or bool(settings and settings.get("equal_params")) != part.equal_params:
            continue
        changed = (
            None
            if settings is None
            else changed_settings(part.task, settings) | other_samples(part.task, record.get("samples"))
        )
        scale = str(record["scale"])
        unlike = record.get("departures")
        departures = tuple(map(str, unlike)) if isinstance(unlike, list) else ()
        for ours in found:
            if (ours.scale, ours.changed, ours.departures) == (scale, changed, departures) and not _contradicts(
                ours.records, record
            ):
                break
        else:
            ours = Ours(scale, changed, departures)
            found.append(ours)
        if file not in ours.files:
            ours.files.append(file)
        # A copy of a file that was passed as well brings the same records again.
        if record not in ours.records:
            ours.records.append(record)
    return sorted(found, key=lambda ours: not ours.paper_scale)


def _contradicts(records: Sequence[Record], record: Record) -> bool:
    own = ("mechanism", "heads", "seed")
    return any(other != record and all(other[key] == record[key] for key in own) for other in records)


def _lines(part: Part, ours: Ours | None) -> list[Line]:
    """The paper's rows in its order, then rows of ours that it does not have."""
    published = {(str(row["mechanism"]), int(str(row["heads"]))): row for row in part.published()}
    own = {(row.mechanism, row.heads): row for row in summarise(ours.records)} if ours else {}
    heads = {heads for _, heads in published}
    named = list(dict.fromkeys(name for name, _ in own))
    more = [key for key in own if key not in published and (not part.largest or key[1] in heads)]
    more.sort(key=lambda key: (named.index(key[0]), key[1]))  # by mechanism, as the paper's
    return [Line(*key, published.get(key), own.get(key)) for key in (*published, *more)]
