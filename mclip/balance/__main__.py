"""`python -m mclip.balance EMBEDDINGS_DIR OUT_DIR --threshold T --metric M`: see `mclip.balance`."""

import argparse
import sys
from pathlib import Path

from mclip.balance import sets
from mclip.balance.components import StateError
from mclip.balance.sets import balance
from mclip.data.stores.balance import METRICS, BalanceError, convert, write
from mclip.data.stores.rows import RowsError, read_folder
from mclip.system.workers import BACKENDS, WorkerError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mclip.balance", description=sets.__doc__.split("\n")[0]
    )
    parser.add_argument("embeddings", help="folder in clip-retrieval's layout: img_emb/, metadata/")
    parser.add_argument(
        "out", help="folder for balance.parquet (and kept_uids.npy for DataComp uids)"
    )
    parser.add_argument(
        "--threshold", type=float, required=True, help="largest distance that links images"
    )
    parser.add_argument(
        "--metric", choices=METRICS, required=True, help="what the threshold is measured in"
    )
    parser.add_argument(
        "--key", help="metadata column that names a sample (default: uid, key or image_path)"
    )
    parser.add_argument(
        "--workers", type=int, default=1, help="processes (default: this one, with threads)"
    )
    parser.add_argument(
        "--backend", choices=BACKENDS, default="processes", help="of several workers"
    )
    args = parser.parse_args(argv)
    try:
        convert(args.threshold, args.metric)
        files, keys = read_folder(args.embeddings, args.key)
        if keys is None:
            print(
                f"{args.embeddings}/metadata: none; samples are named by row number",
                file=sys.stderr,
            )
        result = balance(
            files,
            keys,
            threshold=args.threshold,
            metric=args.metric,
            state=Path(args.out) / ".balance-state.npz",
            workers=args.workers,
            backend=args.backend,
            scratch=args.out,
        )
        write(args.out, result)
    except (BalanceError, RowsError, StateError, WorkerError) as err:
        print(err, file=sys.stderr)
        return 2
    print(result.summary())
    return 0


if __name__ == "__main__":
    sys.exit(main())
