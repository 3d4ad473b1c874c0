"""Finds the artifact: commands take a run folder as well as the file."""

from pathlib import Path

from pgolf.artifact.foreign import refuse_foreign
from pgolf.errors import ArtifactError


def artifact_of(path: Path) -> Path:
    """The artifact file that `path` is, or that the run folder `path` holds.

    Raises:
        ArtifactError: there is none, or the file is another program's.
    """
    if path.is_file():
        refuse_foreign(path)
        return path
    if not path.is_dir():
        raise ArtifactError(f"{path}: no such file or run folder; name one of `pgolf train`")
    file = path / "artifact"
    if file.is_file():
        return file
    if (path / "config.json").is_file():
        raise ArtifactError(
            f"{path} holds no artifact yet: its run has not finished, go on with it by "
            f"`pgolf train RECIPE out={path} resume=true`"
        )
    raise ArtifactError(f"{path} is no run folder: it holds no artifact and no config.json")
