"""The texts of a record folder: README.md, the logs, requirements.txt."""

from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import packages_distributions, version
from typing import Any

from pgolf.config import Config, to_dict
from pgolf.training.run_folder import flat

README = """# {name}

{blurb}

| seed | steps | val_loss | val_bpb | bytes_total |
|---|---|---|---|---|
{rows}

The script scores the artifact with val_bpb **{val_bpb:.8f}**{of_seeds}; {hardware}, PyTorch
{pytorch_version}.{note}

## Files

- `train_gpt.py` holds all code: those sources of the package pgolf that a run needs,
  minified and compressed, {bytes_code:,} bytes: {code_parts}. It reads no
  file of an installed pgolf.
- `artifact` holds the model of seed {seed}, {bytes_model:,} bytes; with the code
  {bytes_total:,} bytes.
- `train_seed*.log`: the log of each seed. `requirements.txt`: the libraries that the script
  imports, in the versions that made the artifact.

## Score and train again

```
DATA_PATH=FOLDER_OF_SHARDS TOKENIZER_PATH=FILE.model python train_gpt.py
DATA_PATH=FOLDER_OF_SHARDS TOKENIZER_PATH=FILE.model torchrun --standalone --nproc_per_node=8 \\
    train_gpt.py train
```

Without these names the script looks in `data/datasets` and `data/tokenizers`, where the contest has
them. `SEED` chooses another seed. The script has pgolf's Triton kernels but not those in C++ and
CUDA: where the runs of this record used one, training runs the Triton kernel or plain PyTorch in
its place, which computes the same function, at another speed and with other roundings.

## Settings

What differs from pgolf's defaults:

```
{settings}
```
"""


def code_parts(parts: Mapping[str, int]) -> str:
    """The bytes of a script by purpose, as a phrase."""
    return (
        f"{parts['scoring']:,} for scoring ({parts['decoder']:,} of them for the artifact's "
        f"codec), {parts['training']:,} more for training"
    )


def of_seeds(values: Mapping[str, Any]) -> str:
    """The scores of several seeds, as a phrase that follows the shipped run's score."""
    if "val_bpb_mean" not in values:
        return ""
    mean, std = values["val_bpb_mean"], values["val_bpb_std"]
    return f" (mean of {len(values['seeds'])} seeds {mean:.8f}, std {std:.8f})"


def readme(
    values: Mapping[str, Any], config: Config, parts: Mapping[str, int], note: str
) -> str:
    """README.md.

    Args:
        values: what submission.json holds.
        config: settings of the shipped run.
        parts: bytes of the script by what they are for.
        note: how the script's score differs from the run's, if it does.
    """
    rows = [
        f"| {seed} | {r['steps']:,} | {r['val_loss']:.8f} | {r['val_bpb']:.8f} | "
        f"{r['bytes_total']:,} |"
        for seed, r in values["seed_results"].items()
    ]
    defaults = flat(to_dict(Config()))
    local = ("data.data", "data.tokenizer", "run.out", "run.resume")
    settings = [
        f"{key}={value}"
        for key, value in flat(to_dict(config)).items()
        if value != defaults[key] and key not in local
    ]
    return README.format(
        **values,
        rows="\n".join(rows),
        of_seeds=of_seeds(values),
        note=note and f" That is {note}.",
        code_parts=code_parts(parts),
        seed=config.run.seed,
        settings="\n".join(settings),
    )


def console_log(metrics: Sequence[dict[str, Any]], result: dict[str, Any], code: int) -> str:
    """The lines of metrics.jsonl as the contest's scripts print them."""
    steps, lines = result["steps"], []
    for m in metrics:
        clock = f"train_time:{1000 * m['seconds']:.0f}ms"
        if m["kind"] == "train":
            average = f"step_avg:{m['ms_per_step']:.2f}ms"
            lines.append(f"step:{m['step']}/{steps} train_loss:{m['loss']:.4f} {clock} {average}")
        elif m["kind"] == "val":
            score = f"val_loss:{m['loss']:.4f} val_bpb:{m['bpb']:.4f}"
            lines.append(f"step:{m['step']}/{steps} {score} {clock}")
        else:
            lines.append(f"step:{m['step']} {m['text']}")
    model = result["bytes_model"]
    lines.append(f"Total submission size: {model + code} bytes (model {model} + code {code})")
    lines.append(
        f"final_roundtrip_exact val_loss:{result['val_loss']:.8f} val_bpb:{result['val_bpb']:.8f}"
    )
    return "\n".join(lines) + "\n"


def requirements(modules: Iterable[str]) -> str:
    """requirements.txt: the distributions that these modules are from, as they are installed."""
    distributions = packages_distributions()
    packages = {distributions[module][0] for module in modules}
    # A local part, such as +cu130, names a build that an index may not have.
    return "".join(f"{name}=={version(name).partition('+')[0]}\n" for name in sorted(packages))
