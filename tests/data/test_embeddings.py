"""Embeddings as people have them: read, or refused with a line that says what to do."""

import numpy as np
import pandas as pd
import pytest

from mclip import balance, cli
from mclip.data.stores import embeddings
from mclip.data.stores.embeddings import EmbeddingsError
from mclip.data.stores.rows import Rows

ROWS = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
ROWS[3] = ROWS[1]


def write(folder, *parts, names="img_emb_{}.npy"):
    (folder / "img_emb").mkdir(parents=True)
    for i, rows in enumerate(parts):
        np.save(folder / "img_emb" / names.format(i), rows)
    return folder


@pytest.mark.parametrize("dtype", [">f2", ">f4", ">f8", np.longdouble])
def test_numbers_of_other_machines(tmp_path, dtype):
    rows = ROWS.astype(dtype)
    write(tmp_path, rows[:4], rows[4:])
    files = embeddings.index(tmp_path).image
    for kept in (
        balance.balance(files, threshold=1e-4, metric="sql2"),
        balance.balance(rows, threshold=1e-4, metric="sql2"),
    ):
        assert kept.set_id[3] == kept.set_id[1] and kept.keep.sum() == 5
    unit = ROWS / np.linalg.norm(ROWS, axis=1, keepdims=True)
    assert np.abs(embeddings.load(tmp_path).image - unit).max() < 2e-3
    assert Rows(files).tensors[0].dtype.itemsize <= 8


def test_what_is_no_float_is_still_refused(tmp_path):
    write(tmp_path, ROWS.astype(">i4"))
    with pytest.raises(EmbeddingsError, match=r"img_emb_0.npy: expected floats .*found >i4"):
        embeddings.index(tmp_path)


def test_files_whose_number_is_not_clear(tmp_path):
    write(tmp_path / "twice", ROWS)
    np.save(tmp_path / "twice/img_emb/img_emb_0000.npy", ROWS)
    with pytest.raises(EmbeddingsError, match=r"img_emb_0000?.npy: img_emb_0(000)?.npy has the s"):
        embeddings.index(tmp_path / "twice")
    write(tmp_path / "none", ROWS)
    np.save(tmp_path / "none/img_emb/rest.npy", ROWS)
    with pytest.raises(EmbeddingsError, match=r"rest.npy: its name has no number at its end"):
        embeddings.index(tmp_path / "none")


def test_a_git_lfs_pointer_says_so(tmp_path):
    write(tmp_path, ROWS)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (tmp_path / "metadata").mkdir()
    table, rows = tmp_path / "metadata/metadata_0.parquet", tmp_path / "img_emb/img_emb_0.npy"
    for file in (table, rows):
        file.write_text(pointer)
        with pytest.raises(EmbeddingsError, match=rf"{file.name}: .*run `git lfs pull`"):
            embeddings.index(tmp_path)
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool/a.npz").write_text(pointer)
    with pytest.raises(EmbeddingsError, match=r"a.npz: .*run `git lfs pull`"):
        embeddings.index(tmp_path / "pool")


# --- DataComp's metadata --------------------------------------------------------------------------


def write_pool(folder, save=np.savez, dtype=np.float16):
    """Six rows in two shards, in DataComp's layout."""
    folder.mkdir(parents=True)
    for name, part in (("ab" * 16, slice(0, 4)), ("cd" * 16, slice(4, 6))):
        rows = ROWS[part].astype(dtype)
        arrays = {"b32_img": rows[:, :3], "b32_txt": rows[:, :3]}
        save(folder / f"{name}.npz", **arrays, l14_img=rows, l14_txt=rows[::-1])
        table = pd.DataFrame({"uid": [f"{i:032x}" for i in range(6)][part]})
        table["url"], table["text"] = "u", [f"caption {i}" for i in range(6)][part]
        table.to_parquet(folder / f"{name}.parquet")
    return folder


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("below", [".", "metadata"])
def test_datacomps_metadata(tmp_path, save, below):
    write_pool(tmp_path / "pool" / below, save)
    found = embeddings.load(tmp_path / "pool")
    unit = ROWS / np.linalg.norm(ROWS, axis=1, keepdims=True)
    assert found.keys == [f"{i:032x}" for i in range(6)]
    assert found.captions[5] == "caption 5" and found.shard.tolist() == [0] * 4 + [1] * 2
    assert np.abs(found.image - unit).max() < 2e-3  # of l14, the widest
    assert np.abs(found.text - unit[[3, 2, 1, 0, 5, 4]]).max() < 2e-3
    index = embeddings.index(tmp_path / "pool")
    mapped = [isinstance(embeddings.open_rows(path), np.memmap) for path in index.image]
    assert mapped == [save is np.savez] * 2 and index.has_metadata


def test_balancing_datacomps_metadata(tmp_path, capsys):
    pool, out = write_pool(tmp_path / "pool", dtype=">f4"), tmp_path / "out"
    argv = ["balance", str(pool), str(out), "--threshold", "1e-4", "--metric", "sql2"]
    assert cli.main(argv) == 0
    assert "row numbers name samples" not in capsys.readouterr().err
    kept = np.load(out / "kept_uids.npy")
    assert len(kept) == 5 and kept.dtype == np.dtype("u8,u8")


def test_broken_metadata_of_datacomp(tmp_path):
    pool = write_pool(tmp_path / "pool")
    first, second = sorted(pool.glob("*.npz"))
    np.savez(second, l14_img=ROWS[:3].astype(np.float16))
    with pytest.raises(EmbeddingsError, match=r"\.parquet has 2 rows, l14_img has 3"):
        embeddings.index(pool)
    np.savez(second, b32_img=ROWS[:2])
    with pytest.raises(EmbeddingsError, match=rf"{second.name}: no array l14_img"):
        embeddings.index(pool)
    second.unlink()
    first.with_suffix(".parquet").unlink()
    assert not embeddings.index(pool).has_metadata
    np.savez(first, features=ROWS)
    with pytest.raises(EmbeddingsError, match=r"no array of images, \*_img \(there are features"):
        embeddings.index(pool)
    first.write_bytes(b"PK")
    with pytest.raises(EmbeddingsError, match=r"not a whole .npz file"):
        embeddings.index(pool)
