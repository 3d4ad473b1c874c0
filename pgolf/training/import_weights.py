"""`pgolf import`: weights that another program trained, as a run folder.

The folder has what eval, verify, sample and pack read: config.json, a checkpoint, tokenizer.model,
the artifact. It has no result.json: nothing was trained here, so nothing is stated about it.
"""

import io
import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgolf.artifact.foreign import compressor, decompress, explain, kind
from pgolf.config import Config, with_overrides
from pgolf.errors import ArtifactError, PgolfError
from pgolf.extras import safetensors
from pgolf.files import atomic_write, sha256_of
from pgolf.model import GPT
from pgolf.model.public_names import BANKS, from_public
from pgolf.ranks import Ranks
from pgolf.training.export import Export, export
from pgolf.training.run_folder import RunFolder
from pgolf.training.session import BuildScript, claimed_folder, open_session

MAX_BYTES = 8 << 30  # of a file, and of what a compressed one may grow to
WRAPPED = ("model", "state_dict", "model_state_dict")
# Settings that change what the model computes and leave no trace in the shapes of its weights.
UNSEEN = (
    "activation", "leaky_slope", "xsa_layers", "rope_dims", "rope_base", "layer_scale", "qk_norm",
    "smear", "documents", "ve_layers", "softcap", "norm_eps",
)  # fmt: skip


def read_weights(path: Path) -> tuple[dict[str, Tensor], str]:
    """A state dict, and in words what it came from. No code of the file is run.

    Raises:
        ArtifactError: it is not a file of weights, damaged, or holds more than plain tensors.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ArtifactError(f"{path}: {size:,} bytes, the limit is {MAX_BYTES:,}")
        data = path.read_bytes()
    except OSError as e:
        raise ArtifactError(f"cannot read {path}: {e.strerror}") from e
    form = kind(data)
    if form == "safetensors":
        return _safetensors(path, data), "safetensors"
    if form != "torch":
        raise ArtifactError(f"{path} is {explain(data)}; expected a state dict of torch.save")
    content = decompress(data, MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ArtifactError(f"{path} grows to more than {MAX_BYTES:,} bytes")
    try:
        values = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError) as e:
        raise ArtifactError(
            f"{path} is damaged, or holds more than tensors, which would run its code: save it "
            f"with torch.save(model.state_dict(), FILE) ({str(e).splitlines()[0]})"
        ) from e
    state, form = _state(path, values)
    packed = compressor(data)
    return state, form + (f", compressed with {packed}" if packed else "")


def _safetensors(path: Path, data: bytes) -> dict[str, Tensor]:
    library = safetensors()
    from safetensors import SafetensorError

    try:
        return library.load(data)
    except SafetensorError as e:
        raise ArtifactError(f"{path}: a damaged safetensors file ({e})") from e


def _state(path: Path, values: Any) -> tuple[dict[str, Tensor], str]:
    """The tensors by name in what torch.load gave."""
    if isinstance(values, dict) and values.keys() == {"w", "m"}:
        return _dequantized(path, values["w"], values["m"]), "quantised weights"
    for key in WRAPPED:
        if isinstance(values, dict) and isinstance(values.get(key), dict):
            values = values[key]
            break
    if not isinstance(values, dict):
        raise ArtifactError(f"{path} holds no state dict but a {type(values).__name__}")
    others = [str(k) for k, v in values.items() if not isinstance(v, Tensor)]
    if others or not values:
        raise ArtifactError(
            f"{path} holds no state dict: {', '.join(others[:5]) or 'it is empty'}"
            + (" is no tensor" if others else "")
        )
    banked = any(str(k).endswith(tuple(BANKS)) for k in values)
    form = "banks of layers" if banked else "a tensor a layer"
    return {str(k): v for k, v in values.items()}, form


def _dequantized(path: Path, stored: Any, methods: Any) -> dict[str, Tensor]:
    """Weights of the public scripts' quantised form: codes and a step for each row."""
    state = {}
    try:
        for name, method in methods.items():
            if isinstance(method, str):  # kept as it was
                state[name] = stored[name]
                continue
            codes, steps = stored[f"{name}.q"].float(), stored[f"{name}.scale"].float()
            if steps.ndim and steps.shape != codes.shape[:1]:
                raise ArtifactError(f"{path}: {name} has steps of groups, which are not read")
            state[name] = codes * steps.reshape(-1, *[1] * (codes.ndim - 1))
    except (AttributeError, KeyError, TypeError) as e:
        raise ArtifactError(f"{path}: its codes and steps are not those of a known form") from e
    return state


def imported_model(state: Mapping[str, Tensor], config: Config) -> tuple[GPT, Config]:
    """The model with these weights, and its settings: tables in fp32 if bf16 would round them.

    Raises:
        ConfigError: the weights do not fit; see `from_public`.
    """
    weights = from_public(state, config.model)
    tables = [v for n, v in weights.items() if n.endswith("emb.weight") or ".embed." in n]
    if any(not torch.equal(v.float(), v.bfloat16().float()) for v in tables):
        config = with_overrides(config, {"table_dtype": "fp32"})
    model = GPT(config.model, max_length=config.data.seq_len)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name])
    return model, config


def import_run(
    file: Path, config: Config, device: torch.device, build_script: BuildScript
) -> tuple[RunFolder, Export]:
    """Write the run folder that `config.run.out` names.

    Raises:
        PgolfError: the file, the data or the folder is not what it has to be: nothing is written;
            or packing failed: the checkpoint is there, the message says how to go on.
    """
    state, form = read_weights(file)
    model, config = imported_model(state, config)
    ranks = Ranks(0, 1, device)
    with claimed_folder(config, ranks) as folder:
        session = open_session(config, ranks, folder)
        config = session.config
        folder.open(config, session.dataset)
        origin = {"file": str(file.resolve()), "sha256": sha256_of(file), "form": form}
        atomic_write(folder.path / "imported.json", json.dumps(origin, indent=2) + "\n")
        averager = {"ema": {}, "swa": {}, "snapshots": 0}  # of weights that are the last ones
        folder.save(0, {"model": model.state_dict(), "averager": averager})
        print(f"{file}: {form}, {sum(p.numel() for p in model.parameters()):,} parameters")
        unseen = ", ".join(f"{key}={getattr(config.model, key)}" for key in UNSEEN)
        print(f"weights do not show these settings, they are the recipe's: {unseen}")
        try:
            script = build_script(config)
            return folder, export(session, model.to(device), script, folder.artifact)
        except PgolfError as e:
            raise type(e)(
                f"{e}; the weights are in {folder.path}: pack them with other settings by "
                f"`pgolf pack {folder.path} --out {folder.artifact} key=value ...`"
            ) from e
