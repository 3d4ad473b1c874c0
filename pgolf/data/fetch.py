"""The contest's data from its Hugging Face repository, checked, resumable.

The layout is the same on the server and here, see `pgolf.data.contest`; the server has it below a
folder, `datasets/`. Each file is downloaded beside its place, checked, then moved there, so a file
with its final name is whole. A file that is there already and passes its check is not fetched.
"""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from pgolf.data.contest import DATASET_PREFIX, MANIFEST, ContestLayout
from pgolf.data.manifest import Dataset
from pgolf.data.shards import open_shard
from pgolf.data.tokenizer import load_tokenizer
from pgolf.errors import ConfigError, DataError, StorageError
from pgolf.progress import Progress

REPO_VARIABLE = "MATCHED_FINEWEB_REPO_ID"
PREFIX_VARIABLE = "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX"
REPO, PREFIX = "willdepueoai/parameter-golf", "datasets"
# The contest's own default: 8 billion tokens.
TRAIN_SHARDS = 80


def download(repo_id: str, remote_path: str, local_dir: Path) -> Path:
    """Download one file of a Hugging Face dataset repository to somewhere below `local_dir`.

    The only place that touches the network.

    Raises:
        DataError: huggingface_hub is missing, the server cannot be reached, or has no such file.
        StorageError: the file could not be written.
    """
    try:
        from huggingface_hub import errors, hf_hub_download
    except ImportError as e:
        raise DataError(
            "downloading needs huggingface_hub: pip install 'pgolf[data]'; "
            "or prepare your own text with `pgolf data prepare`"
        ) from e
    what = f"{remote_path} of https://huggingface.co/datasets/{repo_id}"
    try:
        return Path(hf_hub_download(repo_id, remote_path, repo_type="dataset", local_dir=local_dir))
    except errors.LocalEntryNotFoundError as e:
        # what the library raises when it can neither reach the server nor find a local copy
        raise DataError(
            f"cannot download {what}: no connection to the server; try again when online, or "
            "prepare your own text with `pgolf data prepare`"
        ) from e
    except (errors.EntryNotFoundError, errors.RepositoryNotFoundError) as e:
        raise DataError(f"there is no {what}: check {REPO_VARIABLE} and {PREFIX_VARIABLE}") from e
    except Exception as e:
        if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES):
            raise StorageError(f"cannot write {what} below {local_dir}: {e.strerror}") from e
        # the library passes on whatever its network stack raises
        raise DataError(f"cannot download {what}: {e}; run the command again to go on") from e


def fetch(variant: str, out: Path | str, train_shards: int | None = None) -> Dataset:
    """Get a variant of the contest's data into `out`; what is there and whole stays as it is.

    Args:
        variant: such as `sp1024`.
        out: the layout's root; the shards go to `out/datasets/fineweb10B_<variant>/`.
        train_shards: how many training shards, from the first; the validation text always comes
            whole. None takes 80, or all if there are fewer.

    Raises:
        DataError: no connection, no such variant, or a file that is not what it should be.
        ConfigError: more training shards than there are, or fewer than one.
        StorageError: something could not be written.
    """
    out, dataset = Path(out), DATASET_PREFIX + variant
    remote = _Remote(out)
    layout = remote.layout(variant)
    counts = {split: layout.shard_count(dataset, split) for split in ("train", "val")}
    tokenizer = layout.tokenizer_name(dataset)
    if tokenizer is None or not counts["train"] or not counts["val"]:
        raise DataError(
            f"{out / MANIFEST} states no SentencePiece model or no number of shards for {variant}: "
            f"choose another variant of {', '.join(layout.variants())}"
        )
    requested = min(TRAIN_SHARDS, counts["train"]) if train_shards is None else train_shards
    if not 1 <= requested <= counts["train"]:
        raise ConfigError(
            f"{requested} training shards asked for, {variant} has 1 to {counts['train']}"
        )
    shards = [
        f"datasets/{dataset}/fineweb_{split}_{i:06d}.bin"
        for split, count in (("val", counts["val"]), ("train", requested))
        for i in range(count)
    ]
    label = f"fetching {variant} from {remote.repo_id}"
    with Progress(label, 1 + len(shards), "files", every=1.0) as progress:
        sp = load_tokenizer(remote.get(f"tokenizers/{tokenizer}", load_tokenizer))
        progress.update(note=tokenizer)
        for path in shards:
            remote.get(path, lambda file: open_shard(file, sp.get_piece_size()))
            progress.update(note=Path(path).name)
    shutil.rmtree(remote.arriving, ignore_errors=True)
    return Dataset.open(out / "datasets" / dataset)


class _Remote:
    """Files of the server, each checked before it gets its place below `out`.

    They arrive in their own folder, which stays if a download breaks off: the next call resumes.
    """

    def __init__(self, out: Path):
        self.repo_id = os.environ.get(REPO_VARIABLE, REPO)
        self.prefix = os.environ.get(PREFIX_VARIABLE, PREFIX).strip("/")
        self.out, self.arriving = out, out / ".fetch"

    def get(self, path: str, check: Callable[[Path], object]) -> Path:
        """The file at `path` of the layout, downloaded unless it is there and passes `check`."""
        target = self.out / path
        if target.exists():
            try:
                check(target)
                return target
            except DataError:
                # damaged, or from another data set: get it anew
                pass
        self._download(path, check)
        return target

    def layout(self, variant: str) -> ContestLayout:
        """The manifest here if it lists the variant, else the server's.

        Raises:
            DataError: the server's manifest does not list it either.
        """

        def lists(root: Path) -> None:
            variants = ContestLayout.at(root).variants()
            if variant not in variants:
                raise DataError(
                    f"{self.repo_id} has no variant {variant!r}, it has {', '.join(variants)}"
                )

        self.get(MANIFEST, lambda file: lists(file.parent))
        return ContestLayout.at(self.out)

    def _download(self, path: str, check: Callable[[Path], object]) -> None:
        target = self.out / path
        try:
            self.arriving.mkdir(parents=True, exist_ok=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            file = download(self.repo_id, f"{self.prefix}/{path}".lstrip("/"), self.arriving)
            try:
                check(file)
            except DataError:
                file.unlink()
                raise
            os.replace(file, target)
        except OSError as e:
            raise StorageError(f"cannot write {target}: {e.strerror or e}") from e
