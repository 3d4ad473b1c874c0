"""Libraries that are imported where they are needed.

Each function raises ConfigError if its library is not installed or does not load; the message says
how to fix that.
"""

from importlib import import_module
from types import ModuleType

from pgolf.errors import ConfigError


def safetensors() -> ModuleType:
    """safetensors.torch, of the format's own library."""
    need = "safetensors files need the library safetensors"
    return _loaded("safetensors.torch", need, "pip install 'pgolf[export]'")


def python_minifier() -> ModuleType:
    """python_minifier, which a submission's code goes through before its bytes are counted."""
    need = "counting the bytes of a run's code needs the library python-minifier"
    return _loaded("python_minifier", need, "pip install python-minifier")


def matplotlib() -> ModuleType:
    """matplotlib with its figures, which takes a second to load."""
    need, remedy = "figures need the library matplotlib", "pip install --upgrade matplotlib"
    library = _loaded("matplotlib", need, remedy)
    _loaded("matplotlib.figure", need, remedy)
    return library


def tensorboard() -> ModuleType:
    """torch.utils.tensorboard, whose files the package tensorboard writes."""
    need = "log=tensorboard needs the library tensorboard"
    return _loaded("torch.utils.tensorboard", need, "pip install 'pgolf[log]'")


def trackio() -> ModuleType:
    """trackio, which keeps the numbers of runs on this machine or on the Hugging Face Hub."""
    return _loaded("trackio", "log=trackio needs the library trackio", "pip install 'pgolf[log]'")


def _loaded(module: str, need: str, remedy: str) -> ModuleType:
    try:
        return import_module(module)
    except Exception as e:  # also of its own libraries, and of a backend that MPLBACKEND invents
        raise ConfigError(f"{need}, which does not load ({e}): {remedy}") from e
